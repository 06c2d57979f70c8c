"""Structs that travel between packages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moejax.core.structs import ExpertPlacement, MoEMetrics, Routing, at_layer, zero_metrics


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


def test_a_layer_of_a_placement():
    slots = np.array([[0, 1, 0], [1, 0, 1]], np.int32)
    placement = ExpertPlacement(
        phys_to_log=slots,
        log_to_phys=np.array([[[0, 2], [1, -1]], [[1, -1], [0, 2]]], np.int32),
        num_replicas=np.array([[2, 1], [1, 2]], np.int32),
    )
    one = jax.jit(at_layer)(placement, jnp.int32(1))
    assert one.phys_to_log.tolist() == [1, 0, 1] and one.num_replicas.tolist() == [1, 2]
    assert (one.num_slots, one.num_experts) == (placement.num_slots, 2) == (3, 2)
    shared = at_layer(one, 5)
    assert shared.log_to_phys.tolist() == [[1, -1], [0, 2]]
