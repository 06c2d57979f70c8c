"""Levels and chunks of a run's dispatch, as the measured links of its mesh advise."""

import dataclasses

import jax.numpy as jnp

from configs.run import RunConfig
from moejax.core.errors import check
from moejax.costmodel.advice import Advice, Calibration, LayerShape, advise


def follow_calibration(cfg: RunConfig, found: Calibration) -> tuple[RunConfig, Advice]:
    """The config with the fastest levels and chunks, and why these.

    Raises `InputError` where the run's dispatch has no levels, or its mesh is not the one that was
    measured.
    """
    dispatch, model, sizes = cfg.train.dispatch, cfg.model, dataclasses.asdict(cfg.mesh)
    check(
        dispatch.strategy == "hierarchical",
        f"--calibration chooses levels and chunks of hierarchical, got {dispatch.strategy!r}",
    )
    used = {axis: sizes[axis] for axis in dispatch.axes if sizes[axis] > 1}
    check(found.sizes == used, f"the calibration is of a mesh {found.sizes}, the run's is {used}")
    layer = LayerShape(
        tokens=cfg.train.batch_size * cfg.train.seq_len // (sizes["data"] * sizes["expert"]),
        num_experts=model.router.num_experts,
        top_k=model.router.top_k,
        d_model=model.d_model,
        d_ff=model.d_ff,
        value_bytes=jnp.dtype(model.dtype).itemsize,
    )
    advice = advise(found, layer)
    # Axes with one rank are not calibrated; sending over them costs nothing.
    levels = len(advice.choice.levels) if len(used) == len(dispatch.axes) else None
    chosen = dataclasses.replace(dispatch, num_levels=levels, num_chunks=advice.num_chunks)
    train = dataclasses.replace(cfg.train, dispatch=chosen)
    return dataclasses.replace(cfg, train=train), advice
