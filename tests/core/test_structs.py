"""Structs that travel between packages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moejax.core.structs import MoEMetrics, Routing, zero_metrics


def test_leaves_may_be_specs_and_shapes():
    specs = Routing(topk_idx=P("data"), topk_weights=P("data"), router_logits=P())
    assert jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)) == [
        P("data"),
        P("data"),
        P(),
    ]
    shapes = jax.eval_shape(lambda: zero_metrics(3))
    assert isinstance(shapes, MoEMetrics) and shapes.expert_load.shape == (3,)


def test_zero_metrics_are_neutral_and_keep_the_types_of_a_layer():
    metrics = zero_metrics(4)
    for field in dataclasses.fields(MoEMetrics):
        leaf = getattr(metrics, field.name)
        assert leaf.dtype == (jnp.float32 if field.name.endswith("_loss") else jnp.int32)
        assert leaf.shape == ((4,) if field.name == "expert_load" else ())
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
