"""FSMoE's six hooks: called in order by every strategy, free when they do nothing, on the wire."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.aot.hlo import parse_hlo
from moejax.collectives.inspect import inspect_collectives
from moejax.dispatch.all_to_all import all_to_all
from moejax.dispatch.api import make_dispatch
from moejax.dispatch.hooks import Hooks, hook_layer, hooked, narrow_wire
from moejax.dispatch.slots import FITS_ALL
from moejax.experts.stage import resident_counts
from moejax.layers.moe import MoEConfig, init_moe, moe
from moejax.layers.parallel import Parallel
from moejax.layers.slot_moe import SlotMoEConfig, init_slot_moe, slot_moe
from moejax.routing.config import RouterConfig, SoftConfig
from tests.dispatch.cases import Layout, layout, specs
from tests.dispatch.gates import random_like
from tests.kernels.cases import assert_close

E, D, T, K = 8, 8, 64, 2
CFG = MoEConfig(d_ff=4, router=RouterConfig(num_experts=E, top_k=K))
SOFT = SlotMoEConfig(d_ff=4, router=SoftConfig(num_experts=E))
NAMES = [field.name for field in dataclasses.fields(Hooks)]
FLAT = layout(1, 8)
NESTED = layout(2, 4, both=True)

# Strategy, its options, mesh, rows that arrive at a rank.
STRATEGIES = {
    "gather": ({}, FLAT, T),
    "all_to_all": ({"capacity": FITS_ALL}, FLAT, E * T // 8),
    "hierarchical": ({"levels": ("data", "expert")}, NESTED, T),
    "slots": ({"gate": "soft"}, FLAT, E),
    "local": ({}, None, T),
}


def on_mesh(layer, params, cfg, stage, where: Layout | None):
    """`(params, x) -> y`, over the mesh when there is one."""
    axes = where.token_axes if where else ()

    def body(params, x):
        return layer(params, x, cfg, stage=stage, parallel=Parallel(token_axes=axes))[0]

    if where is None:
        return body
    in_specs = (specs(params, where), P(axes))
    return jax.shard_map(body, mesh=where.mesh, in_specs=in_specs, out_specs=P(axes))


def build(name: str, hooks: Hooks | None):
    """A whole layer with `hooks` (None: without any), its abstract arguments."""
    options, where, _ = STRATEGIES[name]
    if where is not None:
        options = {**options, "token_axes": where.token_axes}
    stage = make_dispatch(name, num_experts=E, hooks=hooks, **options)
    soft = name == "slots"
    layer, cfg, init = (slot_moe, SOFT, init_slot_moe) if soft else (moe, CFG, init_moe)
    params = jax.eval_shape(
        partial(init, cfg=cfg, d_model=D, out_scale=1.0, dtype=jnp.float32), jax.random.key(0)
    )
    layer = layer if hooks is None else hook_layer(layer, hooks)
    x = jax.ShapeDtypeStruct((T, D), jnp.float32)
    return on_mesh(layer, params, cfg, stage, where), (params, x)


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_six_are_called_once_in_order(name):
    seen = []

    def note(hook, rows):
        seen.append((hook, rows.shape))
        return rows

    fn, arguments = build(name, Hooks(**{hook: partial(note, hook) for hook in NAMES}))
    jax.eval_shape(fn, *arguments)
    assert [hook for hook, _ in seen] == NAMES
    shapes, (_, where, arrived) = dict(seen), STRATEGIES[name]
    own = T if where is None else T // 8
    assert shapes["before_moe_start"] == shapes["before_dispatch"] == (own, D)
    assert shapes["before_moe_end"] == (own, D)
    assert shapes["after_dispatch"] == (arrived, D)
    assert shapes["before_combine"][0] == arrived and shapes["after_combine"][0] == own


@pytest.mark.parametrize("name", STRATEGIES)
def test_hooks_that_do_nothing_leave_the_same_program(name):
    programs = []
    for hooks in (None, Hooks()):
        fn, arguments = build(name, hooks)
        programs.append(str(jax.make_jaxpr(fn)(*arguments)))
    assert programs[0] == programs[1]
    assert len(programs[0]) > 1000


def test_narrow_rows_travel_in_every_composition():
    """In chunks, with a fallback: what comes out is as wide as what went in."""
    hooks = narrow_wire(jnp.bfloat16)
    for name in STRATEGIES:
        fn, arguments = build(name, hooks)
        assert jax.eval_shape(fn, *arguments).dtype == jnp.float32
    options = {"num_chunks": 2, "fall_back": True, "token_axes": FLAT.token_axes}
    stage = make_dispatch("all_to_all", num_experts=E, hooks=hooks, **options)
    _, (params, x) = build("all_to_all", None)
    y = jax.eval_shape(on_mesh(moe, params, CFG, stage, FLAT), params, x)
    assert (y.shape, y.dtype) == ((T, D), jnp.float32)


def bend(x, routing, weights, layer, state):
    """Experts that are all the same function: cheap to compile, and rows tell if they are lost."""
    del weights, layer
    outputs = jnp.broadcast_to(jnp.sin(3 * x)[:, None], (*routing.topk_idx.shape, D))
    return outputs, state, resident_counts(routing.topk_idx[:, 0])


@pytest.fixture(scope="module")
def wires():
    """Per wire dtype: the lowered all-to-alls, bytes of the compiled ones, (y, gradient of x)."""
    params, x = random_like(build("all_to_all", None)[1])
    dispatch = partial(all_to_all, num_experts=E, token_axes=FLAT.token_axes, capacity=FITS_ALL)
    found = {}
    for wire in (jnp.float32, jnp.bfloat16, jnp.float16):
        fn = on_mesh(moe, params, CFG, hooked(dispatch, narrow_wire(wire), bend), FLAT)

        def both_ways(x, fn=fn):
            y, pull = jax.vjp(partial(fn, params), x)
            return y, pull(jnp.cos(x))[0]

        program = jax.jit(both_ways).lower(x)
        lines = [line for line in program.as_text().splitlines() if "stablehlo.all_to_all" in line]
        compiled = program.compile()
        traffic = inspect_collectives(parse_hlo(compiled.as_text()), FLAT.mesh).traffic
        nbytes = traffic["all-to-all", "expert"].nbytes
        found[jnp.dtype(wire).name] = lines, nbytes, compiled(x)
    return found


def test_a_narrow_wire_halves_the_bytes_of_rows(wires):
    """In StableHLO for bfloat16; in XLA:CPU's own program, which widens bfloat16, for float16."""
    for name, mark in {"float32": "xf32>", "bfloat16": "xbf16>", "float16": "xf16>"}.items():
        rows = [line for line in wires[name][0] if "xi32>" not in line]
        assert len(rows) == 4 and all(mark in line for line in rows)  # both ways, twice
    # Of each rank's E * T / 8 slots seven eighths leave it, and come back.
    rows = 8 * (E * T // 8 * 7 // 8) * D * 4
    assert wires["float32"][1] - wires["float16"][1] == 4 * rows // 2
    assert wires["float32"][1] >= 4 * rows


def test_a_narrow_wire_stays_within_the_tolerance_of_its_dtype(wires):
    want = wires["float32"][2]
    for name, tolerance in {"bfloat16": 2**-6, "float16": 2**-9}.items():
        assert_close(wires[name][2], want, tolerance)
        off = max(np.abs(a - b).max() for a, b in zip(wires[name][2], want, strict=True))
        assert off > 1e-5  # it was narrow
