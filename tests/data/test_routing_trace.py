import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.routing_trace import (
    DECODE,
    PREFILL,
    from_recorded,
    load_trace,
    save_trace,
    take_sequences,
)

L, T, K, E = 3, 7, 2, 8


def make_trace(**kwargs):
    rng = np.random.default_rng(0)
    idx = np.argsort(rng.random((L, T, E)), axis=-1)[..., :K]
    idx[2, :2] = E  # a layer that did not see two prompt tokens
    defaults = dict(
        num_experts=E,
        expert_bytes=[10, 10, 30],
        topk_weights=rng.random((L, T, K)),
        sequence_lengths=[4, 3],
        prompt_lengths=[2, 0],
        meta={"model": "toy", "layers": [0, 1, 2]},
    )
    return from_recorded(idx, **(defaults | kwargs))


def assert_same(a, b):
    np.testing.assert_array_equal(a.topk_idx, b.topk_idx)
    np.testing.assert_array_equal(a.expert_bytes, b.expert_bytes)
    np.testing.assert_array_equal(a.sequence_lengths, b.sequence_lengths)
    np.testing.assert_array_equal(a.prompt_lengths, b.prompt_lengths)
    assert a.num_experts == b.num_experts and a.meta == b.meta
    assert (a.topk_weights is None) == (b.topk_weights is None)
    if a.topk_weights is not None:
        np.testing.assert_array_equal(a.topk_weights, b.topk_weights)


def test_derived_views():
    trace = make_trace()
    assert (trace.num_layers, trace.num_tokens, trace.top_k) == (L, T, K)
    assert trace.topk_idx.dtype == np.int32 and trace.topk_weights.dtype == np.float32
    assert trace.phase.tolist() == [PREFILL] * 2 + [DECODE] * 5
    assert trace.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert trace.sequence_starts.tolist() == [0, 4]
    assert (~trace.present).sum() == 4


def test_a_jitted_model_records_what_from_recorded_reads():
    import jax

    logits = jax.random.normal(jax.random.key(0), (L, T, E))
    idx = jax.jit(lambda x: jax.lax.top_k(x, K)[1])(logits)
    trace = from_recorded(idx, num_experts=E, expert_bytes=100)
    np.testing.assert_array_equal(trace.topk_idx, np.argsort(-logits, axis=-1)[..., :K])
    assert trace.expert_bytes.tolist() == [100] * L
    assert trace.sequence_lengths.tolist() == [T] and trace.phase.tolist() == [DECODE] * T


def test_take_sequences_splits_without_overlap():
    trace = make_trace()
    second = take_sequences(trace, [1])
    np.testing.assert_array_equal(second.topk_idx, trace.topk_idx[:, 4:])
    assert_same(take_sequences(trace, [0, 1]), trace)
    swapped = take_sequences(trace, [1, 0])
    np.testing.assert_array_equal(swapped.topk_idx[:, 3:], trace.topk_idx[:, :4])
    assert swapped.prompt_lengths.tolist() == [0, 2]
    with pytest.raises(InputError, match="sequence 2 is not in"):
        take_sequences(trace, [2])


@pytest.mark.parametrize("weights", [True, False])
def test_save_and_load_round_trip(tmp_path, weights):
    trace = make_trace() if weights else make_trace(topk_weights=None)
    save_trace(tmp_path / "deep" / "t.npz", trace)
    assert_same(load_trace(tmp_path / "deep" / "t.npz"), trace)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["t.npz"]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.npz"
    save_trace(path, make_trace())
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_trace(path, make_trace(meta={"model": object()}))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_experts=4), r"topk_idx covers \[0, 8\], not \[0, num_experts=4\]"),
        (dict(expert_bytes=[1, 2]), "expert_bytes has 2 entries, expected 3"),
        (dict(expert_bytes=0), "expert_bytes holds 0, below 1"),
        (dict(expert_bytes=1.5), "expert_bytes is float64"),
        (dict(sequence_lengths=[4, 4]), "sequence_lengths sum to 8, the trace has 7 tokens"),
        (dict(prompt_lengths=[5, 0]), "a prompt is longer than its sequence"),
        (dict(prompt_lengths=[1]), "prompt_lengths has 1 entries, expected 2"),
        (dict(topk_weights=np.ones((L, T))), r"topk_weights is \(3, 7\), topk_idx \(3, 7, 2\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        make_trace(**change)


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (np.zeros((2, 3), int), r"topk_idx is \(2, 3\), not \[L, T, K\]"),
        (np.zeros((2, 3, 1)), "topk_idx is float64, not integers"),
        (np.zeros((2, 0, 1), int), "not \\[L, T, K\\]"),
        (np.ones((2, 3, 2), int), "layer 0, token 0 chose an expert twice"),
    ],
)
def test_wrong_indices_are_refused(idx, message):
    with pytest.raises(InputError, match=message):
        from_recorded(idx, num_experts=4, expert_bytes=1)


def test_load_refuses_what_save_did_not_write(tmp_path):
    good = tmp_path / "good.npz"
    save_trace(good, make_trace())
    content = dict(np.load(good))
    truncated = tmp_path / "truncated.npz"
    truncated.write_bytes(good.read_bytes()[:-200])
    flipped = bytearray(good.read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(flipped)
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "foreign.npz", a=1)
    np.savez(tmp_path / "newer.npz", **(content | {"version": 2}))
    np.savez(tmp_path / "less.npz", **{k: v for k, v in content.items() if k != "expert_bytes"})
    np.savez(tmp_path / "wrong.npz", **(content | {"num_experts": 3}))
    np.savez(tmp_path / "list.npz", **(content | {"num_experts": [8, 8]}))
    np.savez(tmp_path / "meta.npz", **(content | {"meta": "3"}))
    np.savez(tmp_path / "version.npz", **(content | {"version": "one"}))
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name, message in {
        "missing.npz": "No such file",
        "truncated.npz": "not a readable npz",
        "flipped.npz": "not a readable npz",
        "empty.npz": "not a readable npz",
        "text.npz": "not a readable npz",
        "array.npy": "not a readable npz",
        "foreign.npz": r"not a moejax.routing_trace; it holds \['a'\]",
        "newer.npz": "version 2, this program reads 1",
        "list.npz": "only",
        "meta.npz": "'int' object is not iterable",
        "version.npz": "version one, this program reads 1",
        "less.npz": "without 'expert_bytes'",
        "wrong.npz": "topk_idx covers",
    }.items():
        with pytest.raises(InputError, match=f"{name}: .*{message}"):
            load_trace(tmp_path / name)
