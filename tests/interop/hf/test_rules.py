"""Layouts: what they load is saved as it was, and stands where it should."""

import numpy as np
import pytest

from moejax.interop.hf import rules

D, H, DH, F, R = 5, 3, 4, 6, 7

# Layout, shape of the tensor, shapes of the parameters.
LAYOUTS = {
    "as is": (rules.AS_IS, (4, D), [(4, D)]),
    "flat": (rules.FLAT, (H * DH,), [(H, DH)]),
    "row": (rules.FLAT_ROW, (1, D), [(D,)]),
    "linear": (rules.LINEAR, (H * DH, D), [(D, H, DH)]),
    "from heads": (rules.linear(inputs=2), (D, H * DH), [(H, DH, D)]),
    "pairs": (rules.paired(DH), (H * DH, D), [(D, H, DH)]),
    "last pairs": (rules.paired(2), (H * DH, D), [(D, H, DH)]),
    "gate and up": (rules.GATE_UP, (2 * F, D), [(D, F), (D, F)]),
    "gate and up as is": (rules.GATE_UP_AS_IS, (D, 2 * F), [(D, F), (D, F)]),
    "interleaved": (rules.GATE_UP_INTERLEAVED, (D, 2 * F), [(D, F), (D, F)]),
    "interleaved bias": (rules.GATE_UP_INTERLEAVED, (2 * F,), [(F,), (F,)]),
    "two per head": (rules.heads_of_two(4, 2), (H * 6, R), [(R, H, 4), (R, H, 2)]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back(name):
    layout, shape, shapes = LAYOUTS[name]
    tensor = np.arange(np.prod(shape)).reshape(shape)
    arrays = layout.load(tensor, shapes)
    assert [array.shape for array in arrays] == shapes
    assert sorted(np.concatenate([array.ravel() for array in arrays])) == list(range(tensor.size))
    np.testing.assert_array_equal(layout.save(arrays), tensor)


def test_where_things_stand():
    tensor = np.arange(H * DH * D).reshape(H * DH, D)
    (w,) = rules.LINEAR.load(tensor, [(D, H, DH)])
    assert w[2, 1, 3] == tensor[1 * DH + 3, 2]
    (w,) = rules.paired(DH).load(tensor, [(D, H, DH)])
    assert [w[2, 1, i] for i in range(4)] == [tensor[DH + j, 2] for j in (0, 2, 1, 3)]
    (w,) = rules.paired(2).load(tensor, [(D, H, DH)])
    np.testing.assert_array_equal(w, tensor.T.reshape(D, H, DH))
    gate, up = rules.GATE_UP_INTERLEAVED.load(np.arange(6), [(3,), (3,)])
    assert list(gate) == [0, 2, 4] and list(up) == [1, 3, 5]
    both = np.arange(H * 6 * R).reshape(H * 6, R)
    k, v = rules.heads_of_two(4, 2).load(both, [(R, H, 4), (R, H, 2)])
    assert k[5, 1, 3] == both[1 * 6 + 3, 5] and v[5, 1, 1] == both[1 * 6 + 5, 5]
