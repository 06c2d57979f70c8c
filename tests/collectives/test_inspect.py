"""Bytes that a compiled program moves are those that the schedule says, and overlap is seen."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.aot.compile import compile_for
from moejax.aot.hlo import parse_hlo
from moejax.aot.targets import target_mesh
from moejax.collectives import compose
from moejax.collectives.builders import BUILDERS, shifted_round_trip
from moejax.collectives.codecs import BlockQuant
from moejax.collectives.inspect import cross_slice_bytes, inspect_collectives
from moejax.collectives.lower import run_schedule
from moejax.collectives.traffic import Traffic, traffic
from moejax.core.mesh import make_mesh
from tests.collectives.cases import NATIVE, sharded

GRID = {"data": 2, "expert": 4}
CHUNK = 3 * 4  # bytes of a row of 3 float32


def _compiled(fn, rows):
    run, x, mesh = sharded(fn, GRID, rows)
    return inspect_collectives(parse_hlo(run.lower(x).compile().as_text()), mesh)


def _permutes(schedule, chunk_bytes, copies=1):
    return {
        ("collective-permute", axis): Traffic(
            messages=moved.messages * copies, nbytes=moved.nbytes * copies
        )
        for axis, moved in traffic(schedule, chunk_bytes).items()
    }


def _all_builders(width):
    """Their schedules, a function that runs all, and their bytes; inputs [8, width] per rank.

    Each runs on numbers of its own, so that none is folded away.
    """
    schedules = [b.build(GRID) for b in BUILDERS.values() if b.operation != "parity"]
    schedules.append(compose.with_combine(BUILDERS["ring_all_reduce"].build(GRID), "max"))
    coded = BUILDERS["hierarchical_all_reduce"].build(GRID)
    schedules.append(compose.with_codec(coded, BlockQuant(8, 16), "data"))

    def run(x):
        twice = jnp.concatenate([x, x])
        rows = (twice[: len(one.start[0])] for one in schedules)
        inputs = ((1.5 + i) * row for i, row in enumerate(rows))
        return [run_schedule(one, row)[0] for one, row in zip(schedules, inputs, strict=True)]

    want = {axis: Traffic() for axis in GRID}
    for one in schedules:
        for axis, moved in traffic(one, 4 * width).items():
            want[axis] += moved
    return run, {("collective-permute", axis): moved for axis, moved in want.items()}


def test_compiled_bytes_are_those_of_the_schedules():
    run, want = _all_builders(3)
    found = _compiled(run, 8)
    assert found.traffic == want
    assert all(one.start == one.done for one in found.flights)  # XLA:CPU: all synchronous
    assert (found.max_in_flight, found.overlapped) == (0, ())


@pytest.mark.full
@pytest.mark.parametrize("target", ["v5e:2x4", "v6e:2x4", "v5p:2x2x2"])
def test_bytes_on_tpu_are_those_of_the_schedules(target):
    mesh, spec = target_mesh(target, **GRID), P(tuple(GRID))
    run, want = _all_builders(256)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=NamedSharding(mesh, spec))
    assert inspect_collectives(compile_for(mapped, [x]).module, mesh).traffic == want


def test_a_gradient_moves_the_same_bytes_again():
    schedule = BUILDERS["two_level_all_to_all"].build(GRID)

    def both(x):
        y, pullback = jax.vjp(lambda x: run_schedule(schedule, x)[0], x)
        return pullback(jnp.sin(y))[0]

    assert _compiled(both, 8).traffic == _permutes(schedule, CHUNK, copies=2)


def test_each_coordinate_of_another_axis_runs_the_schedule():
    schedule = BUILDERS["shifted_all_to_all"].build({"expert": 4})
    found = _compiled(lambda x: run_schedule(schedule, x)[0], 4)
    assert found.traffic == _permutes(schedule, CHUNK, copies=2)


@pytest.mark.parametrize(
    "name, rows, each, kind",
    [
        ("ring_reduce_scatter", 8, 1, "reduce-scatter"),
        ("ring_all_gather", 1, 1, "all-gather"),
        ("ring_all_reduce", 8, 2, "all-reduce"),
        ("shifted_all_to_all", 8, 1, "all-to-all"),
    ],
)
def test_native_collectives_move_as_much_as_the_optimal_schedule(name, rows, each, kind):
    found = _compiled(lambda x: NATIVE[BUILDERS[name].operation](x, tuple(GRID)), rows)
    # Of 7 others, 3 are in the same row of the grid; one chunk to each, twice for an all-reduce.
    assert {key: moved.nbytes for key, moved in found.traffic.items()} == {
        (kind, "data"): 8 * 4 * CHUNK * each,
        (kind, "expert"): 8 * 3 * CHUNK * each,
    }
    ours = traffic(BUILDERS[name].build(GRID), CHUNK)
    total = sum(moved.nbytes for moved in found.traffic.values())
    assert total == sum(moved.nbytes for moved in ours.values())


TEXT = """\
HloModule jit_f, is_scheduled=true

%fused (p0: bf16[4,512], p1: bf16[512,512]) -> bf16[4,512] {
  %p0 = bf16[4,512]{1,0} parameter(0)
  %p1 = bf16[512,512]{1,0} parameter(1)
  ROOT %dot.1 = bf16[4,512]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[4,512], w: bf16[512,512]) -> bf16[4,512] {
  %x = bf16[4,512]{1,0} parameter(0)
  %w = bf16[512,512]{1,0} parameter(1)
  %one = (bf16[4,512]{1,0}, bf16[4,512]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %two = (bf16[4,512]{1,0}, bf16[4,512]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=2, source_target_pairs={{0,3},{1,2},{2,1},{3,0}}
  %work = bf16[4,512]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused
  %two.done = bf16[4,512]{1,0} collective-permute-done(%two)
  %view = bf16[4,512]{1,0} bitcast(%work)
  %one.done = bf16[4,512]{1,0} collective-permute-done(%one)
  %three = (bf16[4,512]{1,0}, bf16[4,512]{1,0}, u32[], u32[]) collective-permute-start(%view), channel_id=3, source_target_pairs={{0,2},{2,0}}
  %three.done = bf16[4,512]{1,0} collective-permute-done(%three)
  ROOT %sum = bf16[4,512]{1,0} add(%one.done, %three.done)
}
"""  # noqa: E501


def test_flights_and_what_they_hide_behind():
    found = inspect_collectives(parse_hlo(TEXT), make_mesh(data=2, expert=2))
    product = 2 * 4 * 512 * 512
    assert [(f.collective.name, f.in_flight, f.computes, f.flops) for f in found.flights] == [
        ("one", 1, 1, product),
        ("two", 2, 1, product),
        ("three", 1, 0, 0),
    ]
    assert found.max_in_flight == 2 and len(found.overlapped) == 2
    row = 4 * 512 * 2
    assert found.traffic == {
        ("collective-permute", "expert"): Traffic(messages=4, nbytes=4 * row),
        ("collective-permute", "data"): Traffic(messages=6, nbytes=6 * row),
    }


def test_experts_run_while_others_travel_on_tpu():
    """Compiled for v5e: each expert product hides permutes, and two or more are in flight."""
    mesh, ranks, rows, width = target_mesh("v5e:2x2", expert=4), 4, 256, 512
    schedule = shifted_round_trip({"expert": ranks})

    def layer(x, w):
        def transform(step, arrived):
            return jnp.tanh(arrived @ w) if step < ranks - 1 else arrived

        return run_schedule(schedule, x, transform=transform)[0]

    spec = P("expert")
    fn = jax.shard_map(layer, mesh=mesh, in_specs=(spec, P()), out_specs=spec)
    x = (ranks * ranks, rows, width), spec
    w = (width, width), P()
    facts = compile_for(
        fn,
        [
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, place))
            for shape, place in (x, w)
        ],
    )
    found = inspect_collectives(facts.module, mesh)
    assert found.traffic == _permutes(schedule, rows * width * 2)
    assert found.max_in_flight >= 2
    product = 2 * rows * width * width
    hiding = [one for one in found.flights if one.flops >= product]
    assert len(found.flights) == 2 * (ranks - 1) and len(hiding) >= ranks - 1


SLICES = """\
HloModule jit_f, is_scheduled=true

ENTRY %main (x: u8[1,264192]) -> u8[1,264192] {
  %x = u8[1,264192]{1,0:T(4,128)(4,1)} parameter(0)
  %after-all = token[] after-all()
  %send = (u8[1,264192]{1,0:T(4,128)(4,1)}, u32[], token[]) send(%x, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %other = (f32[64]{0}, u32[], token[]) send(%x, %after-all), channel_id=3, is_host_transfer=true
  %recv = (u8[1,264192]{1,0:T(4,128)(4,1)}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %recv-done = (u8[1,264192]{1,0:T(4,128)(4,1)}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %y = u8[1,264192]{1,0:T(4,128)(4,1)} get-tuple-element(%recv-done), index=0
}
"""  # noqa: E501


def test_what_leaves_a_slice_is_what_is_sent_to_the_megascale_runtime():
    assert cross_slice_bytes(parse_hlo(SLICES)) == 264192
