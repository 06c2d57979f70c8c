"""HierMoE's model against its published figures and against counting."""

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.costmodel.hierarchy import (
    candidate_levels,
    choose_levels,
    duplication_rate,
    incidences,
    level_rows,
    touched_share,
)
from moejax.costmodel.links import Link

# Fitted on 4 nodes x 2 sockets x 2 pairs x 2 GPUs (HierMoE, Fig. 9), milliseconds and per byte.
MEASURED = {
    ("node", "socket", "pair", "gpu"): (0.722, 5.70e-7),
    ("node",): (0.497, 5.29e-7),
    ("socket", "pair", "gpu"): (0.571, 1.27e-7),
    ("socket",): (0.301, 1.17e-7),
    ("pair", "gpu"): (0.114, 2.63e-8),
    ("pair",): (0.149, 2.06e-8),
    ("gpu",): (0.204, 1.64e-8),
}
LINKS = {
    level: Link(alpha_s=1e-3 * alpha, beta_s_per_byte=1e-3 * beta)
    for level, (alpha, beta) in MEASURED.items()
}
SIZES = {"node": 4, "socket": 2, "pair": 2, "gpu": 2}


def test_table_ii_of_hiermoe_within_two_points():
    table = {
        32: (2, 4, 7, 9),
        16: (3, 9, 14, 18),
        8: (6, 17, 27, 34),
        4: (12, 32, 46, 55),
    }
    for groups, row in table.items():
        for top_k, percent in zip((2, 4, 6, 8), row, strict=True):
            assert abs(100 * duplication_rate(128, top_k, groups) - percent) <= 2


def test_three_levels_are_best_on_the_published_cluster():
    shares = {u: touched_share(128, 8, u) for u in (4, 8, 16, 32)}
    choice = choose_levels(SIZES, LINKS, tokens=1024, row_bytes=4096, shares=shares)
    assert choice.levels == (("node",), ("socket",), ("pair", "gpu"))
    # The paper's t_2 .. t_4 for Qwen3-30B-A3B, within 2 %.
    got = [1e3 * s for s in choice.seconds.values()]
    np.testing.assert_allclose(got[1:], [13.2, 12.5, 13.0], rtol=0.02)
    assert min(choice.seconds.values()) == choice.seconds[choice.levels]
    assert "node > socket > pair+gpu: 12." in choice.explain()


def test_rows_are_the_incidences_of_all_ranks():
    rng = np.random.default_rng(0)
    tokens, sizes = 64, {"a": 2, "b": 4}
    idx = np.stack([rng.permutation(16)[:4] for _ in range(8 * tokens)])
    shares = {u: incidences(idx, 16, u).mean() / len(idx) for u in (2, 8)}
    rows = level_rows((("a",), ("b",)), sizes, tokens=tokens, shares=shares)
    counts = [incidences(idx, 16, u).sum() for u in (2, 8)]
    np.testing.assert_allclose([8 * n for n in rows], counts)


def test_incidences_equal_a_loop_and_skip_padding():
    idx = np.array([[0, 1], [0, 5], [7, 3], [8, 8]])
    assert incidences(idx, 8, 2).tolist() == [3, 2]
    assert incidences(idx, 8, 4).tolist() == [2, 1, 1, 1]


def test_candidates_merge_the_inner_axes():
    assert candidate_levels(("a", "b", "c")) == (
        (("a", "b", "c"),),
        (("a",), ("b", "c")),
        (("a",), ("b",), ("c",)),
    )


def test_missing_links_and_uneven_groups_are_refused():
    with pytest.raises(InputError, match="no link over b among 1 links"):
        choose_levels({"b": 2}, {("a",): LINKS["gpu",]}, tokens=1, row_bytes=1, shares={2: 0.5})
    with pytest.raises(InputError, match="num_experts=10 is not divisible by 4 groups"):
        touched_share(10, 2, 4)
