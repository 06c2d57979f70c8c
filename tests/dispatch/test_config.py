"""Configs of a dispatch become stages or are refused; what they compute is tested in training."""

import pytest

from moejax.core.errors import InputError
from moejax.dispatch.config import DispatchConfig

AXES = ("data", "expert")


@pytest.mark.parametrize("strategy", ["gather", "all_to_all", "ragged", "hierarchical"])
@pytest.mark.parametrize("over_data", [False, True])
def test_every_strategy_without_further_choices_is_one_name_away(strategy, over_data):
    cfg = DispatchConfig(strategy=strategy, over_data=over_data, num_chunks=2)
    assert callable(cfg.stage(8, "top_k", AXES))
    assert cfg.axes == (AXES if over_data else ("expert",))


def test_levels_are_all_axes_unless_told_otherwise():
    both = DispatchConfig(strategy="hierarchical", over_data=True)
    one = DispatchConfig(strategy="hierarchical", over_data=True, num_levels=1)
    assert both.levels == (("data",), ("expert",))
    assert one.levels == (AXES,)


@pytest.mark.parametrize(
    "strategy, lowering",
    [
        ("gather", "native"),
        ("all_to_all", "dma"),
        ("hierarchical", "shifted"),
        ("ragged", "dma"),
    ],
)
def test_a_lowering_is_one_name_away(strategy, lowering):
    assert callable(DispatchConfig(strategy=strategy, lowering=lowering).stage(8, "top_k", AXES))
    with pytest.raises(InputError, match=f"lowering='slow' is not one of .* of '{strategy}'"):
        DispatchConfig(strategy=strategy, lowering="slow")


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="strategy='local' is not one of .*'all_to_all', 'gather'"):
        DispatchConfig(strategy="local")
    with pytest.raises(InputError, match="strategy='grouped' is not one of"):
        DispatchConfig(strategy="grouped")  # wants a number of groups
    with pytest.raises(InputError, match="capacity_factor=0 must be positive"):
        DispatchConfig(capacity_factor=0)
    with pytest.raises(InputError, match="num_chunks=0 must be at least 1"):
        DispatchConfig(num_chunks=0)
    with pytest.raises(InputError, match="num_levels=2 is not in 1 to 1, over expert"):
        DispatchConfig(strategy="hierarchical", num_levels=2)
    with pytest.raises(InputError, match="does not go with gate 'soft'"):
        DispatchConfig().stage(8, "soft", AXES)
    with pytest.raises(InputError, match="'gather' drops nothing, it needs no fall_back"):
        DispatchConfig(fall_back=True)
    with pytest.raises(InputError, match="lowering='multicast' wants GPUs, this is cpu"):
        DispatchConfig(lowering="multicast").stage(8, "top_k", AXES)
    with pytest.raises(InputError, match="strategy='slots' is not one of"):
        DispatchConfig(strategy="slots")  # its gates are not causal
    with pytest.raises(InputError, match="num_levels=1 is of hierarchical, not of 'gather'"):
        DispatchConfig(num_levels=1)
