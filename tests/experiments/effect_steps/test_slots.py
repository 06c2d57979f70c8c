"""Ways to use the same slots, on choices and scores that are made up."""

import numpy as np
from rich.console import Console

from experiments.effect_steps.slots import compare, show, work_of

L, N, S, E, K, B = 3, 16, 64, 8, 2, 2


def test_a_path_raises_hits_and_only_what_it_says_in_vain_moves_more():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(L, N, S, E))
    chosen = np.argsort(-scores, axis=-1)[..., :K].astype(np.int32)
    noise = scores + rng.normal(size=scores.shape)
    found = {}
    for name, said in (("right", scores), ("noisy", noise)):
        work, votes = work_of(chosen, said, B, num_experts=E, seed=0)
        found[name] = compare(work, votes, slots=3 * L)
        if name == "right":
            np.testing.assert_array_equal(votes >= 1, work.tokens > 0)
    right, noisy = found["right"], found["noisy"]
    assert right["lru"] == noisy["lru"] and right["true_path"].hits == right["path"].hits
    assert right["path"].prefetched_in_vain == 0 < noisy["path"].prefetched_in_vain
    assert noisy["lru"].hits < noisy["path"].hits < right["path"].hits
    assert right["path_dealt"].moved < noisy["path_dealt"].moved
    console = Console(record=True, width=100)
    cells = {
        name: {
            "hit_rate": one.hit_rate,
            "moved": one.moved,
            "prefetched_in_vain": one.prefetched_in_vain,
        }
        for name, one in noisy.items()
    }
    show(console, {"2": {"37.5%": cells}})
    assert f"{noisy['path_dealt'].hit_rate:.3f}" in console.export_text()
