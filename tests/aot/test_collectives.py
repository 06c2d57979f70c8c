import pytest

from moejax.aot.collectives import collectives, device_groups, device_pairs, mesh_axes
from moejax.aot.hlo import parse_hlo
from moejax.core.mesh import make_mesh

TEXT = """\
HloModule jit_f, is_scheduled=true

ENTRY %main (x: bf16[4,512]) -> bf16[8,512] {
  %x = bf16[4,512]{1,0} parameter(0)
  %sum = bf16[4,512]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add, metadata={op_name="jit(f)/moe_combine/psum"}
  %start = (bf16[4,512]{1,0}, bf16[4,512]{1,0}, u32[], u32[]) collective-permute-start(%sum), channel_id=2, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  %done = bf16[4,512]{1,0} collective-permute-done(%start)
  ROOT %gather = bf16[8,512]{1,0} all-gather(%done), channel_id=3, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, expert=2, model=2)


def test_kind_axes_and_bytes(mesh):
    summed, permuted, gathered = collectives(parse_hlo(TEXT), mesh)
    row = 512 * 2
    assert (summed.kind, summed.axes, summed.nbytes) == ("all-reduce", ("model",), 4 * row)
    assert (permuted.kind, permuted.axes, permuted.nbytes) == (
        "collective-permute",
        ("data",),
        4 * row,
    )
    assert (gathered.kind, gathered.axes, gathered.nbytes) == ("all-gather", ("expert",), 8 * row)
    assert [one.is_async for one in (summed, permuted, gathered)] == [False, True, False]
    assert summed.scope == "jit(f)/moe_combine/psum"


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("{}", ("data", "expert", "model")),
        ("{{0,1,2,3,4,5,6,7}}", ("data", "expert", "model")),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("expert",)),
        ("[2,4]<=[8]", ("expert", "model")),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", ()),
        ("{{0,3},{1,2},{4,7},{5,6}}", ("?",)),
    ],
)
def test_groups_are_named_by_axes(mesh, groups, axes):
    assert (
        mesh_axes(f"x = f32[] all-reduce(y), replica_groups={groups}, channel_id=1", mesh) == axes
    )


def test_generic_async_starts_print_operands_and_results(mesh):
    """Only the results count: the operands stand in the type, too."""
    text = TEXT.replace(
        "%done = bf16[4,512]{1,0} collective-permute-done(%start)",
        "%exchange = ((bf16[4,512]{1,0}), bf16[4,512]{1,0}, u32[]) all-to-all-start(%sum), "
        "channel_id=4, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}\n"
        "  %done = bf16[4,512]{1,0} all-to-all-done(%exchange)",
    )
    (exchange,) = [one for one in collectives(parse_hlo(text), mesh) if one.kind == "all-to-all"]
    assert (exchange.axes, exchange.nbytes, exchange.is_async) == (("model",), 4 * 512 * 2, True)


def test_pairs_and_groups_are_positions_in_the_mesh():
    assert device_pairs("source_target_pairs={{0,4},{4,0}}") == [(0, 4), (4, 0)]
    assert device_pairs("replica_groups={{0,1}}") == []
    assert device_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4) == [[0, 2], [1, 3]]
    assert device_groups("replica_groups={}", 3) == [[0, 1, 2]]


FUSED = """\
HloModule jit_f, is_scheduled=true

%all-reduce-scatter (input: f32[8,512]) -> f32[4,512] {
  %input = f32[8,512]{1,0} parameter(0)
  %sum = f32[8,512]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %slice = f32[4,512]{1,0} dynamic-slice(%sum, %start, %zero), dynamic_slice_sizes={4,512}
}

ENTRY %main (x: f32[8,512]) -> f32[4,512] {
  %x = f32[8,512]{1,0} parameter(0)
  ROOT %fusion = f32[4,512]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501


def test_a_fused_reduce_scatter_of_tpu_is_found(mesh):
    (one,) = collectives(parse_hlo(FUSED), mesh)
    assert (one.name, one.kind, one.axes) == ("fusion", "reduce-scatter", ("model",))
    assert one.nbytes == 8 * 512 * 4
