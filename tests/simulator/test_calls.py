import numpy as np

from moejax.data.routing_trace import from_recorded
from moejax.simulator.calls import calls_of_trace

E = 4


def make_trace():
    """Two sequences: a prompt of 2 and one decoded token, then one decoded token."""
    idx = np.array(
        [
            [[0, 1], [2, 0], [3, 1], [0, 2]],
            [[E, E], [1, 3], [1, 0], [3, 2]],
        ]
    )
    return from_recorded(
        idx,
        num_experts=E,
        expert_bytes=[10, 20],
        sequence_lengths=[3, 1],
        prompt_lengths=[2, 0],
    )


def test_calls_in_order_of_time():
    calls = calls_of_trace(make_trace())
    assert calls.layer.tolist() == [0, 1, 0, 1, 0, 1]
    assert calls.is_decode.tolist() == [False, False, True, True, True, True]
    assert calls.tokens.tolist() == [[0, 2], [0, 2], [2, 3], [2, 3], [3, 4], [3, 4]]
    assert calls.lookups.tolist() == [3, 2, 2, 2, 2, 2]
    # Expert 0 of the first call was named twice; its last mention counts.
    assert calls.granules.tolist() == [
        [1, 2, 0],
        [5, 7, 8],
        [3, 1, 8],
        [5, 4, 8],
        [0, 2, 8],
        [7, 6, 8],
    ]
    assert calls.next_use.tolist() == [
        [2, 4, 4],
        [3, 5, 6],
        [6, 6, 6],
        [6, 6, 6],
        [6, 6, 6],
        [6, 6, 6],
    ]
    assert calls.token_bytes == 2 * (10 + 20)


def test_a_layer_that_saw_no_token_makes_no_call():
    trace = from_recorded(
        np.array([[[0], [1]], [[E], [2]]]), num_experts=E, expert_bytes=1, prompt_lengths=[1]
    )
    calls = calls_of_trace(trace)
    assert calls.layer.tolist() == [0, 0, 1]
    assert calls.lookups.tolist() == [1, 1, 1]


def test_a_trace_of_padding_makes_no_calls():
    calls = calls_of_trace(from_recorded(np.full((2, 3, 1), E), num_experts=E, expert_bytes=1))
    assert calls.granules.shape == (0, 0) and calls.lookups.sum() == 0
