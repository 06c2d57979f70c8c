"""What compilers must be told so that pipelined dispatch hides its collectives.

Found by compiling for the targets (`experiments/aot_dispatch.py`, table in `docs/dispatch.md`).
"""

# XLA:TPU keeps an all-to-all synchronous unless told otherwise; permutes, all-gathers and
# reduce-scatters are asynchronous by default. XLA:GPU makes all of them asynchronous.
_OPTIONS: dict[str, dict[str, bool]] = {"tpu": {"xla_tpu_enable_async_all_to_all": True}}


def overlap_options(platform: str) -> dict[str, bool]:
    """`compiler_options` of `jax.jit` or `Lowered.compile` for a platform (`Device.platform`).

    The training loop passes them. Empty where nothing has to be said.

    >>> overlap_options("tpu")
    {'xla_tpu_enable_async_all_to_all': True}
    """
    return dict(_OPTIONS.get(platform, {}))
