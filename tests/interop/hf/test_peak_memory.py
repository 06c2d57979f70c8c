"""Loading two gigabytes: host memory peaks at the target and two of its largest tensors."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from moejax.core.safetensors import Writer
from moejax.interop.hf.tensors import open_folder
from tests.interop.hf.cases import SHAPES
from tests.interop.hf.models import Case, write_model

D, F, E, L, V = 1024, 4096, 8, 10, 4096
MODEL = dict(
    model_type="mixtral",
    hidden_size=D,
    intermediate_size=F,
    num_local_experts=E,
    num_experts_per_tok=2,
    num_hidden_layers=L,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=V,
    max_position_embeddings=4096,
    dtype="bfloat16",
)


def shapes():
    yield from {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D)}.items()
    yield "model.norm.weight", (D,)
    for layer in range(L):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", (D,)
        for name, out in (("q", D), ("k", D // 4), ("v", D // 4), ("o", D)):
            yield f"{at}self_attn.{name}_proj.weight", (out, D)
        yield f"{at}block_sparse_moe.gate.weight", (E, D)
        for e in range(E):
            for name, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
                yield f"{at}block_sparse_moe.experts.{e}.{name}.weight", shape


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of 2 GB, and a small one of the same architecture."""
    large = tmp_path_factory.mktemp("large")
    noise = np.random.default_rng(0).normal(size=F * D).astype(ml_dtypes.bfloat16)
    writer = Writer(large / "model.safetensors", [name for name, _ in shapes()])
    for name, shape in shapes():
        writer.add(name, noise[: np.prod(shape)].reshape(shape))
    writer.close()
    (large / "config.json").write_text(json.dumps(MODEL))
    small = large / "small"
    write_model(Case("mixtral", "small", json.dumps(SHAPES["mixtral"]["plain"])), small)
    return large, small


def peak_of(folders, *options):
    """{"peak": bytes, "target": bytes} of loading, and the bytes of the largest tensor."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.interop.hf.peak_child", *map(str, folders), *options],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    largest = max(stored.nbytes for stored in open_folder(folders[0]).values())
    figures = json.loads(done.stdout.splitlines()[-1])
    print(*options, figures, largest)
    return figures, largest


@pytest.mark.full
def test_peak_host_memory(folders):
    figures, largest = peak_of(folders)
    assert figures["target"] > 2 * 10**9
    assert figures["peak"] <= figures["target"] + 2 * largest


@pytest.mark.full
def test_the_whole_stack_is_never_held_beside_the_quantised_one(folders):
    """One tensor in float32 is, with the room to round it."""
    figures, largest = peak_of(folders, "int4")
    assert figures["target"] < 0.7 * 10**9
    assert figures["peak"] <= figures["target"] + 10 * largest


@pytest.mark.full
def test_experts_on_disk_are_never_held(folders, tmp_path):
    """The target is what is left without them."""
    figures, largest = peak_of(folders, "any", str(tmp_path))
    assert figures["target"] < 0.1 * 10**9
    assert figures["peak"] <= figures["target"] + 4 * largest
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 2 * 10**9
