"""Loading: packings, layouts, dtypes, meshes, and checkpoints that are not in order."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moejax.core.errors import InputError
from moejax.core.memory import memory_kinds
from moejax.core.mesh import make_mesh
from moejax.core.safetensors import Writer
from moejax.interop.hf.load import load_folder
from moejax.interop.hf.tensors import SINGLE
from tests.interop.hf.cases import SHAPES
from tests.interop.hf.models import Case, write_model

NORM = "model.norm.weight"
EXPERT = "model.layers.1.mlp.experts.3.{}_proj.weight"
GATE = EXPERT.format("gate")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Qwen3-MoE: a dense layer and two with experts."""
    folder = tmp_path_factory.mktemp("qwen3")
    fields = SHAPES["qwen3_moe"]["head_dim"]
    write_model(Case("qwen3_moe", "source", json.dumps(fields)), folder)
    return folder


@pytest.fixture
def folder(source, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(source, tmp_path / "model")


@pytest.fixture(scope="module")
def model(source):
    return load_folder(source, mesh=make_mesh())


def change(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in (config | fields).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder, edit):
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def assert_same(got, want):
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))  # noqa: E731
    jax.tree.map(same, (got.params, got.experts), (want.params, want.experts))


def test_where_weights_are(model, source):
    tensors = load_file(source / SINGLE)
    assert memory_kinds(model.experts) == {"pinned_host"}
    assert memory_kinds(model.params) == {"device"}
    # Layer 1 is the first of the second group, and the first with experts.
    np.testing.assert_array_equal(model.experts.w_gate[0, 3], tensors[GATE].T)
    router = model.params.groups[1].mlp.router.w_router
    np.testing.assert_array_equal(router[0], tensors["model.layers.1.mlp.gate.weight"].T)
    assert model.context == 128 and model.unused == ()
    assert model.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_progress_counts_every_byte(source):
    seen = []
    loaded = load_folder(source, mesh=make_mesh(), progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (loaded.nbytes, loaded.nbytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_fused_experts_are_the_same_model(model, folder):
    """The names that `transformers` uses in memory."""

    def fuse(tensors):
        for layer in (1, 2):
            prefix = f"model.layers.{layer}.mlp.experts."
            parts = {
                part: np.stack([tensors.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(8)])
                for part in ("gate", "up", "down")
            }
            tensors[prefix + "gate_up_proj"] = np.concatenate([parts["gate"], parts["up"]], 1)
            tensors[prefix + "down_proj"] = parts["down"]

    change_tensors(folder, fuse)
    assert_same(load_folder(folder, mesh=make_mesh()), model)


def test_experts_shard_over_a_mesh(model, source):
    sharded = load_folder(source, mesh=make_mesh(expert=4))
    assert sharded.experts.w_up.addressable_shards[0].data.shape == (2, 2, 32, 24)
    assert_same(sharded, model)


def test_dtypes(model, source):
    half = load_folder(source, mesh=make_mesh(), dtype="bfloat16")
    assert half.experts.w_up.dtype == half.params.embed.dtype == jnp.bfloat16
    assert half.params.groups[1].mlp.router.w_router.dtype == jnp.float32
    want = np.asarray(model.experts.w_up).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(half.experts.w_up), want)


def test_block_scaled_fp8(model, folder):
    """Experts in fp8: what they stand for is loaded, and every scale is used."""
    tensors = load_file(folder / SINGLE)
    rng, want = np.random.default_rng(0), {}
    packed = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            packed[name] = tensor
            continue
        values = tensor.astype(ml_dtypes.float8_e4m3fn)
        scale = rng.uniform(0.5, 2, (-(-tensor.shape[0] // 16), -(-tensor.shape[1] // 16)))
        packed[name], packed[name + "_scale_inv"] = values, scale.astype(np.float32)
        spread = np.kron(packed[name + "_scale_inv"], np.ones((16, 16), np.float32))
        want[name] = values.astype(np.float32) * spread[: tensor.shape[0], : tensor.shape[1]]
    writer = Writer(folder / SINGLE, list(packed))
    for name, tensor in packed.items():
        writer.add(name, tensor)
    writer.close()
    change(folder, quantization_config=dict(quant_method="fp8", weight_block_size=[16, 16]))
    got = load_folder(folder, mesh=make_mesh())
    np.testing.assert_array_equal(got.experts.w_gate[0, 3], want[GATE].T)
    down = EXPERT.format("down")
    np.testing.assert_array_equal(got.experts.w_down[0, 3], want[down].T)
    assert "quantization_config" not in got.hf_config


def test_tied_embeddings_may_be_stored_twice(folder, source):
    """With or without the config's word for it; the copy must be the same."""

    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    change_tensors(folder, tie)
    change(folder, tie_word_embeddings=True)
    tied = load_folder(folder, mesh=make_mesh())
    assert tied.params.w_out is None and len(tied.unused) == 2
    change(folder, tie_word_embeddings=...)
    assert load_folder(folder, mesh=make_mesh()).params.w_out is not None
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert load_folder(folder, mesh=make_mesh()).params.w_out is None
    other = shutil.copytree(source, folder.parent / "other")
    change(other, tie_word_embeddings=True)
    with pytest.raises(InputError, match="embeddings are tied, but lm_head.weight differs"):
        load_folder(other, mesh=make_mesh())


def test_weights_that_are_no_numbers_are_named(folder):
    change_tensors(folder, lambda tensors: tensors[GATE].__setitem__((0, 0), np.nan))
    with pytest.warns(UserWarning, match=f"1 tensors hold NaN: {GATE}"):
        load_folder(folder, mesh=make_mesh())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model_type="bert"), "model_type='bert' is not supported, only deepseek_v2"),
        (dict(hidden_size=...), "config.json lacks hidden_size"),
        (dict(hidden_size="32"), 'hidden_size="32" is not of type int'),
        (dict(hidden_act="relu"), 'hidden_act="relu" is not supported, only "silu"'),
        (dict(use_sliding_window=True), "use_sliding_window=true is not supported"),
        (dict(dtype="int8"), "dtype='int8' is not one of float32, bfloat16, float16"),
        (dict(num_experts_per_tok=9), "top_k=9 must be between 1 and num_experts=8"),
        (dict(vocab_size=65), r"embed_tokens.weight has shape \[64, 32\], which does not hold"),
        (dict(num_local_experts=9), r"lacks 6 tensors of the model: .*experts.8.down_proj"),
        (dict(num_hidden_layers=2), r"has 33 tensors too many: model.layers.2"),
        (dict(hidden_size=10**12), r"has shape \[64, 32\], which does not hold"),
        (dict(quantization_config="fp8"), "quantization_config='fp8' is not an object"),
        (dict(quantization_config=dict(quant_method="awq")), "method 'awq' is not supported"),
    ],
)
def test_wrong_configs_are_refused(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(InputError, match=message) as caught:
        load_folder(folder, mesh=make_mesh())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(NORM), "lacks 1 tensors of the model: model.norm.weight"),
        (lambda t: t.update(extra=np.zeros(2)), "has 1 tensors too many: extra"),
        (lambda t: t.update({NORM: t[NORM][:5]}), r"model.norm.weight has shape \[5\]"),
    ],
)
def test_wrong_tensors_are_refused(folder, edit, message):
    change_tensors(folder, edit)
    with pytest.raises(InputError, match=message):
        load_folder(folder, mesh=make_mesh())


def test_experts_that_do_not_divide_over_the_mesh(source):
    with pytest.raises(InputError, match="num_experts=8 is not divisible by expert axis size 3"):
        load_folder(source, mesh=make_mesh(expert=3))


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="config.json does not exist"):
        load_folder(folder, mesh=make_mesh())
