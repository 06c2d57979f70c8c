"""What compilers must be told so that pipelined dispatch hides its collectives.

Found by compiling for the targets (`experiments/aot_dispatch.py`, table in `docs/dispatch.md`).
"""

_OPTIONS: dict[str, dict[str, bool | str]] = {
    # Of the collectives here permutes alone are asynchronous by default.
    "tpu": {
        "xla_tpu_enable_async_all_to_all": True,
        "xla_tpu_enable_async_ragged_all_to_all": True,
    },
    # All collectives are asynchronous, but products of several chunks with the same weights become
    # one product, and their all-gathers and reduce-scatters one collective: nothing is left to
    # hide behind.
    "gpu": {
        "xla_gpu_dot_merger_threshold_mb": "0",
        "xla_gpu_all_gather_combine_threshold_bytes": "0",
        "xla_gpu_reduce_scatter_combine_threshold_bytes": "0",
    },
}


def overlap_options(platform: str) -> dict[str, bool | str]:
    """`compiler_options` of `jax.jit` or `Lowered.compile` for a platform (`Device.platform`).

    The training loop passes them. Empty where nothing has to be said.

    >>> overlap_options("cpu")
    {}
    """
    return dict(_OPTIONS.get(platform, {}))
