"""All-to-all with capacities: exact without drops, exact counts and values with them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.routed import serve_routed
from moejax.aot.compile import compile_for
from moejax.aot.targets import target_mesh
from moejax.core.errors import InputError
from moejax.dispatch.all_to_all import all_to_all, slots_per_group
from moejax.dispatch.slots import FITS_ALL, Capacity
from moejax.experts.slotted import slotted
from moejax.experts.stage import reference
from moejax.kernels.grouped_ffn import GatedWeights
from tests.dispatch.cases import E, check_exact, compiled, first_come, layout, routings

LAYOUTS = {
    "1x8": lambda: layout(1, 8),
    "2x4": lambda: layout(2, 4),
    "2x4_explicit": lambda: layout(2, 4, axis_type="explicit"),
}


def make(where, **kwargs):
    return all_to_all(num_experts=E, token_axes=where.token_axes, **kwargs)


@pytest.mark.parametrize(
    "name, options",
    [
        ("1x8", {"lowering": "shifted"}),
        ("2x4", {"per": "rank", "inner": reference}),
        ("2x4_explicit", {"inner": reference}),
    ],
)
def test_with_room_for_all_it_equals_the_reference(name, options):
    where = LAYOUTS[name]()
    run = compiled(make(where, capacity=FITS_ALL, **options), where)
    for idx in routings().values():
        check_exact(run, idx)


@pytest.mark.full
def test_by_dma_it_equals_the_reference():
    """The kernels run one after the other: several of a layer may share an id."""
    where = layout(2, 4)
    run = compiled(make(where, capacity=FITS_ALL, inner=reference, lowering="dma"), where)
    check_exact(run, routings()["uniform"])


@pytest.mark.full
@pytest.mark.parametrize("target", ["v5e:2x4", "v6e:2x4"])
def test_by_dma_a_layer_compiles_for_tpu(target):
    """A decode step of 16 tokens per chip: rows there and back; who has slots wants no ids."""
    mesh, spec = target_mesh(target, data=2, expert=4), P(("data", "expert"))
    stage = all_to_all(num_experts=64, inner=slotted(4), lowering="dma")
    shapes = [((128, 2048), jnp.bfloat16), ((128, 8), jnp.int32), ((128, 8), jnp.float32)]
    x, idx, weights = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype in shapes
    )
    over = NamedSharding(mesh, P("expert"))
    parts = {"w_gate": (64, 2048, 512), "w_up": (64, 2048, 512), "w_down": (64, 512, 2048)}
    experts = GatedWeights(
        **{k: jax.ShapeDtypeStruct(v, jnp.bfloat16, sharding=over) for k, v in parts.items()}
    )
    body = jax.shard_map(
        lambda *args: serve_routed(stage, *args)[0], mesh=mesh,
        in_specs=(spec, spec, spec, P("expert")), out_specs=spec,
    )  # fmt: skip
    found = compile_for(body, [x, idx, weights, experts])
    kernels = [one.target for _, _, one in found.module.instructions()].count("tpu_custom_call")
    kinds = {one.kind for one in found.collectives}
    assert kernels == 2 and "all-to-all" not in kinds


@pytest.mark.parametrize("per, slots", [("expert", 2), ("rank", 7)])
def test_what_does_not_fit_is_dropped_in_token_order_and_counted(per, slots):
    where = layout(2, 4)
    stage = make(where, capacity=Capacity(slots=slots), per=per, inner=reference)
    run = compiled(stage, where)
    counts = []
    for idx in routings().values():
        group = idx if per == "expert" else idx // (E // where.ranks)
        dropped = first_come(idx, group, slots, ranks=8)
        check_exact(run, idx, dropped=dropped)
        counts.append(dropped.sum())
    assert max(counts) > min(counts) > 0


def test_capacity_in_slots():
    assert slots_per_group(512, 8, 64, 8, Capacity(factor=1.25), "expert") == 80
    assert slots_per_group(512, 8, 64, 8, Capacity(factor=1.25), "rank") == 640
    assert slots_per_group(512, 8, 64, 8, Capacity(slots=9), "rank") == 9
    assert slots_per_group(512, 8, 64, 8, FITS_ALL, "expert") == 512
    assert slots_per_group(512, 8, 16, 8, FITS_ALL, "rank") == 1024
    assert slots_per_group(512, 8, 64, 8, Capacity(factor=99.0), "expert") == 512


def test_wrong_input():
    with pytest.raises(InputError, match="per='node' is neither"):
        all_to_all(num_experts=E, per="node")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(InputError, match="lowering='ring' is not one of"):
        all_to_all(num_experts=E, lowering="ring")  # pyrefly: ignore[bad-argument-type]
    where = layout(1, 8)
    with pytest.raises(InputError, match="num_experts=12 is not divisible by the 8 ranks"):
        run = compiled(all_to_all(num_experts=12, token_axes=where.token_axes), where)
        check_exact(run, routings()["uniform"])
