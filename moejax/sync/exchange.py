"""What workers tell each other in a training step: gradients before the optimizer, weights after.

exchange = make_exchange(SyncConfig(method="diloco", every=16), shapes, ("data",))
"""

import dataclasses
from typing import Any

import optax

from moejax.core.errors import check
from moejax.sync.config import SyncConfig
from moejax.sync.dream import plan_layers
from moejax.sync.fragments import Fragment, by_layer, size, strided, whole
from moejax.sync.plan import SyncPlan, cd_sgd, diloco, local_sgd, partial_local_sgd
from moejax.sync.plan import streaming_diloco as streaming
from moejax.sync.reduce import sent_bytes
from moejax.sync.transform import bytes_per_step, reduce_gradients, synchronise


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Two optax transformations, of which a method has one.

    Attributes:
        gradients: such as `sync.transform.reduce_gradients`.
        weights: such as `sync.transform.synchronise`.
    """

    gradients: optax.GradientTransformation = optax.identity()
    weights: optax.GradientTransformation = optax.identity()


def make_exchange(cfg: SyncConfig, shapes: Any, axes: tuple[str, ...]) -> Exchange:
    """The exchange over mesh `axes` of weights of these shapes.

    Raises `InputError` for method `none`, and for more fragments than layers or steps.
    """
    if cfg.method == "gradients":
        return Exchange(gradients=reduce_gradients(axes, cfg.make_codec(), cfg.feedback))
    plan, fragments = make_plan(cfg, shapes)
    return Exchange(weights=synchronise(plan, fragments, axes))


def make_plan(cfg: SyncConfig, shapes: Any) -> tuple[SyncPlan, tuple[Fragment, ...]]:
    """The plan of a local method, and the fragments that it is about."""
    check(cfg.method not in ("none", "gradients"), f"method={cfg.method!r} has no plan of weights")
    if cfg.method == "local_sgd":
        return local_sgd(cfg.every), whole(shapes)
    if cfg.method == "cd_sgd":
        plan, fragments = cd_sgd(cfg.threshold, cfg.exact_every), whole(shapes)
    elif cfg.method == "diloco":
        plan, fragments = diloco(cfg.every, cfg.make_outer(), cfg.make_codec()), whole(shapes)
    elif cfg.method == "streaming_diloco":
        numbers = (cfg.make_outer(), cfg.make_codec(), cfg.keep_local)
        fragments = strided(by_layer(shapes), cfg.num_fragments)
        plan = streaming(cfg.every, cfg.num_fragments, *numbers)
    else:
        layers = by_layer(shapes)
        # Both grow with the number of weights; only their ratio matters to the plan.
        transfer = [float(size(shapes, layer)) for layer in layers]
        when = plan_layers([t / cfg.link_ratio for t in transfer], transfer, cfg.every).when
        return partial_local_sgd(when, cfg.every), layers
    return dataclasses.replace(plan, feedback=cfg.feedback), fragments


def sent_per_step(cfg: SyncConfig, shapes: Any, workers: int) -> float:
    """Bytes that a device sends per step on average, by the schedules that run.

    Args:
        shapes: of the weights that one device holds.
    """
    if cfg.method == "gradients":
        return sent_bytes(size(shapes, whole(shapes)[0]), workers, cfg.make_codec())
    plan, fragments = make_plan(cfg, shapes)
    return bytes_per_step(plan, fragments, shapes, workers)
