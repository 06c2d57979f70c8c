"""The host store: every expert of every layer, in pinned host memory.

The store is a `GatedWeights` tree with leading axes [L, E]. Its leaves (gate, up, down) are the
parts of an expert: each is fetched by its own transfer, so three are in flight per expert. Inside
jit (and inside `shard_map` when the experts are sharded) `flatten` merges the two leading axes into
the one axis that host slices may have.

Axis letters:
    L  MoE layers    E  experts (of this rank)    N  granules, L * E    D  model dim    F  hidden
"""

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moejax.core import compat
from moejax.core.errors import check
from moejax.core.memory import device_sharding, host_sharding
from moejax.core.mesh import check_divisible
from moejax.kernels.grouped_ffn import GatedWeights

EXPERT_SPEC = P(None, "expert")


def to_host(experts: GatedWeights, mesh: Mesh) -> GatedWeights:
    """Experts [L, E, ...] moved to `pinned_host`, sharded over the `expert` axis of `mesh`.

    For weights that are already somewhere; a checkpoint restores straight to the host instead.
    """
    check_divisible(experts.w_gate.shape[1], mesh)
    return jax.device_put(experts, host_sharding(mesh, EXPERT_SPEC))


def to_device(experts: GatedWeights, mesh: Mesh) -> GatedWeights:
    """Experts [L, E, ...] in device memory, sharded over the `expert` axis of `mesh`."""
    check_divisible(experts.w_gate.shape[1], mesh)
    return jax.device_put(experts, device_sharding(mesh, EXPERT_SPEC))


def check_platform(experts: GatedWeights, platform: str) -> None:
    """Raises `InputError` where `platform` cannot slice host stacks, or not of these widths.

    TPU transfers move whole tiles: the last two dimensions of a host stack must be multiples of
    128, or compilation ends in an internal error. On CUDA some versions of jax read wrong rows.
    """
    d_model, d_ff = experts.w_gate.shape[-2:]
    check(
        platform != "tpu" or (d_model % 128 == 0 and d_ff % 128 == 0),
        "offloading on TPU wants d_model and d_ff to be multiples of 128, "
        f"got {d_model} and {d_ff}",
    )
    check(
        compat.host_slices_are_sound(platform),
        f"offloading on {platform} wants jax 0.11.1 or newer, as older ones may read wrong rows of "
        f"host memory; this is {'.'.join(map(str, compat.JAX_VERSION))}",
    )


def flatten(store: GatedWeights) -> GatedWeights:
    """[L, E, ...] -> [L * E, ...]; row `layer * E + expert`. A view, also of host memory."""
    return jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), store)


def expert_bytes(experts: GatedWeights) -> int:
    """Bytes of one expert, all parts together, of a tree [L, E, ...] or its abstract twin."""
    leaves = jax.tree.leaves(experts)
    granules = leaves[0].shape[0] * leaves[0].shape[1]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) // granules
