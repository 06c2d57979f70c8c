"""Compile a program for a named target and collect the facts of the result.

What comes back belongs to the rung *schedule*: bytes, order, memory. Never a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, Sharding

from moejax.aot import facts
from moejax.aot.collectives import Collective, collectives
from moejax.aot.facts import HostCompute, Transfer
from moejax.aot.hlo import Instruction, Module, parse_hlo
from moejax.core.errors import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """Bytes of one device's program, as the compiler planned them.

    On TPU and GPU the device figures exclude host memory. XLA:CPU counts `pinned_host` as device
    memory, so budgets are asserted on other targets.
    """

    device_arguments: int
    device_outputs: int
    device_aliased: int  # outputs that reuse the buffers of donated arguments
    device_temporaries: int
    host_arguments: int
    host_outputs: int
    host_aliased: int
    host_temporaries: int

    @property
    def device_bytes(self) -> int:
        """Device memory that the program needs while it runs."""
        reused = self.device_aliased
        return self.device_arguments + self.device_outputs - reused + self.device_temporaries

    @property
    def host_bytes(self) -> int:
        """Pinned host memory that the program needs while it runs."""
        reused = self.host_aliased
        return self.host_arguments + self.host_outputs - reused + self.host_temporaries


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledFacts:
    """A program as one compiler scheduled it."""

    module: Module
    mesh: Mesh
    memory: MemoryFacts

    @functools.cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        return facts.transfers(self.module)

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        return collectives(self.module, self.mesh)

    @functools.cached_property
    def host_computes(self) -> tuple[HostCompute, ...]:
        return facts.host_computes(self.module)

    @functools.cached_property
    def host_callbacks(self) -> int:
        return facts.count_host_callbacks(self.module)

    def fetches(self, scope: str = "") -> tuple[Transfer, ...]:
        """Host-to-device transfers under named scopes that contain `scope`."""
        return tuple(
            one
            for one in self.transfers
            if one.direction == "host_to_device" and scope in one.scope
        )

    def overlapped(self, scope: str, compute_scope: str) -> tuple[Transfer, ...]:
        """Those of `fetches(scope)` that span all matrix work under `compute_scope`."""
        return facts.overlapped(self.module, self.fetches(scope), compute_scope)

    def overlapped_host_computes(self, compute_scope: str) -> tuple[HostCompute, ...]:
        """Calls of the host that span all matrix work under `compute_scope`."""
        return facts.overlapped(self.module, self.host_computes, compute_scope)

    def whole_copies(self, shape: Sequence[int]) -> tuple[Instruction, ...]:
        """See `facts.whole_copies`."""
        return facts.whole_copies(self.module, shape)


def abstract(tree: Any, sharding: Sharding) -> Any:
    """`ShapeDtypeStruct`s of the leaves of `tree` (arrays or abstract), placed by `sharding`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def compile_for(
    fn: Callable[..., Any],
    abstract_args: Sequence[Any],
    *,
    donate_argnums: int | Sequence[int] = (),
    out_shardings: Any = None,
    compiler_options: dict[str, Any] | None = None,
) -> CompiledFacts:
    """Compiles `fn(*abstract_args)` for the devices that the arguments are placed on.

    Args:
        fn: a function, or one already wrapped in `jax.jit` with its own donation and shardings.
        abstract_args: trees of `ShapeDtypeStruct`s with `NamedSharding`s over one mesh, usually of
            `targets.target_mesh`. See `abstract`.
        donate_argnums, out_shardings: of `jax.jit`. Give `out_shardings` whenever a host array is
            donated: it can be aliased to an output in the other memory otherwise.

    Raises `InputError` when the arguments do not name one mesh. Cost: seconds; nothing runs.
    """
    mesh = _mesh_of(abstract_args)
    given: dict[str, Any] = {} if donate_argnums == () else {"donate_argnums": donate_argnums}
    if out_shardings is not None:
        given["out_shardings"] = out_shardings
    if isinstance(fn, jax.stages.Wrapped):
        check(not given, f"{', '.join(given)} belong to jax.jit, and fn is jitted already")
    jitted = fn if isinstance(fn, jax.stages.Wrapped) else jax.jit(fn, **given)
    compiled = jitted.trace(*abstract_args).lower().compile(compiler_options)
    return CompiledFacts(
        module=parse_hlo(compiled.as_text() or ""),
        mesh=mesh,
        memory=memory_facts(compiled.memory_analysis()),
    )


def _mesh_of(abstract_args: Sequence[Any]) -> Mesh:
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tuple(abstract_args))]
    named = [one.mesh for one in shardings if isinstance(one, NamedSharding)]
    meshes = {mesh for mesh in named if isinstance(mesh, Mesh)}
    others = len(shardings) - len(named)
    check(
        len(meshes) == 1 and not others,
        "every abstract argument wants a NamedSharding over one mesh, "
        f"found {len(meshes)} meshes and {others} other placements",
    )
    return meshes.pop()


def memory_facts(stats: Any) -> MemoryFacts:
    """What XLA's `CompiledMemoryStats` say."""
    return MemoryFacts(
        device_arguments=stats.argument_size_in_bytes,
        device_outputs=stats.output_size_in_bytes,
        device_aliased=stats.alias_size_in_bytes,
        device_temporaries=stats.temp_size_in_bytes,
        host_arguments=stats.host_argument_size_in_bytes,
        host_outputs=stats.host_output_size_in_bytes,
        host_aliased=stats.host_alias_size_in_bytes,
        host_temporaries=stats.host_temp_size_in_bytes,
    )
