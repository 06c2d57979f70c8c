"""The battery itself: adversarial routing thrashes every slot, and a wrong bit would be seen."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import offload_exactness
from experiments.offload_steps import exactness
from moejax.core.errors import InputError
from tests.exact import exact_jit
from tests.experiments.test_routing_consistency import run_main

SIZE = {"prompt": 3, "new": 6}


@pytest.mark.parametrize(
    "line, message",
    [
        ("--ways=fetch,guess", "--ways=fetch,guess is not of fetch, fetch_lfu"),
        ("--batch_sizes=0", "--batch_sizes=0 is not a list of positive numbers"),
    ],
)
def test_wrong_input_is_refused(line, message):
    with pytest.raises(InputError, match=message):
        run_main(offload_exactness, line)


def test_neighbours_share_no_expert():
    first, rest = exactness.adversarial(2, **SIZE)
    assert first.shape == (exactness.L, 6, exactness.K)
    assert rest.shape == (6, exactness.L, 2, exactness.K)
    text = np.concatenate([np.asarray(first)[:, :3].swapaxes(0, 1), np.asarray(rest)[:, :, 0]])
    for token, after in zip(text, text[1:], strict=False):
        for layer in range(exactness.L):
            assert not set(token[layer]) & set(after[layer])


def test_a_cache_that_wraps_around_gives_the_resident_bits():
    """Two ranks, the least budget, prompts and tokens that always want other experts."""
    model = exactness.make_model(1, **SIZE)
    forced = exactness.adversarial(1, **SIZE)
    resident = exactness.run_resident(model, forced, jit=exact_jit)
    nudged = dataclasses.replace(resident, logits=jax.numpy.nextafter(resident.logits, np.inf))
    case = exactness.Case(way="prefetch", ranks=2, batch=1, budget="minimum")
    found = exactness.check_case(
        model, case, {"adversarial": resident, "own": nudged}, jit=exact_jit
    )["routed"]
    run = found["adversarial"]
    assert run["equal"] and run["relative_difference"] == 0
    # Whatever a rank held, the next token wanted something else of it.
    assert run["hit_rate"] < 0.2 and run["times_through_the_slots"] > 5
    assert not found["own"]["equal"] and 0 < found["own"]["relative_difference"] < 1e-6
