"""Every architecture against `transformers`: logits, routing, greedy tokens, and the way back."""

import functools
import glob

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.memory import memory_kinds
from moejax.core.mesh import make_mesh
from moejax.experts.stage import reference as every_expert
from moejax.interop.hf.export import save_folder
from moejax.interop.hf.load import load_folder
from moejax.interop.hf.registry import MODEL_TYPES, find_architecture
from moejax.interop.hf.tensors import open_folder
from moejax.models.decoder import forward
from moejax.models.experts import join_experts
from moejax.offload.stage import OffloadConfig
from moejax.offload.store import to_device
from moejax.serving.engine import make_engine
from tests.interop.hf.cases import DECODED, SHAPES, parity_cases
from tests.interop.hf.models import reference


# The stage that compiles fastest; that all stages agree is tested elsewhere, and by decoding.
@functools.partial(jax.jit, static_argnames="cfg")
def run(params, tokens, mask, cfg):
    return forward(params, tokens, cfg, mask=mask, stage=every_expert)


@functools.cache
def imported(case, new_tokens):
    return load_folder(reference(case, new_tokens).folder, mesh=make_mesh())


@pytest.fixture
def new_tokens(request):
    return 64 if request.config.getoption("--full") else 8


def padded(rows):
    """Rows of unequal length as int32 [B, S] and their mask, padded on the right."""
    longest = max(len(row) for row in rows)
    tokens = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
    mask = np.stack([np.arange(longest) < len(row) for row in rows])
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)


@pytest.mark.parametrize("case", parity_cases())
def test_logits_and_routing(case, new_tokens):
    """Over prompt and continuation: what is greedy in every position is what was decoded."""
    want, model = reference(case, new_tokens), imported(case, new_tokens)
    rows = [np.concatenate([p, t]) for p, t in zip(want.prompts, want.tokens, strict=True)]
    tokens, mask = padded(rows)
    experts = to_device(model.experts, make_mesh())
    params = join_experts(model.params, experts, model.cfg)
    out = jax.device_get(run(params, tokens, mask, model.cfg))
    top_k = out.record.topk_idx.shape[-1]
    chosen = out.record.topk_idx.reshape(-1, *tokens.shape, top_k)
    for b, row in enumerate(rows):
        np.testing.assert_allclose(out.logits[b, : len(row)], want.logits[b], atol=1e-4)
        start = len(want.prompts[b]) - 1
        greedy = out.logits[b, start : len(row) - 1].argmax(-1)
        np.testing.assert_array_equal(greedy, want.tokens[b])
        assert len(chosen) == len(want.topk_idx) > 0
        for ours, theirs in zip(chosen, want.topk_idx, strict=True):
            np.testing.assert_array_equal(np.sort(ours[b, : len(row)], -1), theirs[b])
    # The weights of this test make a difference: the logits are not those of the embedding alone.
    assert np.abs(out.logits).max() > 0.5


def test_every_architecture_has_three_shapes():
    assert sorted(SHAPES) == sorted(MODEL_TYPES)
    assert all(len(shapes) == 3 for shapes in SHAPES.values())


def decode(model, prompts, new_tokens, offload):
    """Greedy tokens [B, N] of an engine, experts on the device or offloaded."""
    mesh = make_mesh()
    experts = model.experts if offload else to_device(model.experts, mesh)
    tokens, mask = padded(prompts)
    engine = make_engine(
        model.params,
        experts,
        model.cfg,
        mesh,
        capacity=tokens.shape[1] + new_tokens,
        offload=offload,
    )
    session, token, _ = engine.prefill(engine.start(len(prompts)), tokens, mask)
    out = [token]
    for _ in range(new_tokens - 1):
        session, token, _ = engine.step(session)
        out.append(token)
    return np.stack(out, 1)


@pytest.mark.parametrize("case", parity_cases(DECODED))
def test_offloaded_decoding(case, new_tokens):
    """A batch of unequal prompts over the KV cache, experts in host memory."""
    want, model = reference(case, new_tokens), imported(case, new_tokens)
    assert memory_kinds(model.experts) == {"pinned_host"}
    slots = OffloadConfig(num_slots=3 * model.cfg.num_moe_layers)
    got = decode(model, want.prompts, new_tokens, slots)
    np.testing.assert_array_equal(got, want.tokens)


@pytest.mark.parametrize("case", parity_cases(()))
def test_resident_decoding(case, new_tokens):
    want, model = reference(case, new_tokens), imported(case, new_tokens)
    got = decode(model, want.prompts, new_tokens, None)
    np.testing.assert_array_equal(got, want.tokens)


@pytest.mark.parametrize("case", parity_cases())
def test_round_trip(case, new_tokens, tmp_path):
    """Written back in several files: every tensor to the bit, and `transformers` misses none."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    def tensors(folder):
        found = {}
        for path in glob.glob(f"{folder}/*.safetensors"):
            with safe_open(path, "np") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}
        return found

    source = reference(case, new_tokens).folder
    model = imported(case, new_tokens)
    save_folder(model, tmp_path, max_shard_bytes=40_000)
    assert len(glob.glob(f"{tmp_path}/*.safetensors")) > 1
    want, got = tensors(source), tensors(tmp_path)
    assert got.keys() == want.keys() == open_folder(tmp_path).keys()  # which follows the index
    architecture = find_architecture(model.hf_config, source)
    unused = architecture.placeholders(model.cfg)
    assert set(model.unused) == unused.keys()
    for name in want.keys() - unused.keys():
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
