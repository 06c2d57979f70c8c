"""Experts in a folder of a test."""

import jax
import numpy as np

from moejax.offload.disk import layer_tensors, make_folder, open_experts, write_layer

MODEL = "0123456789abcdef"


def shapes_like(experts):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), experts)


def write(folder, experts, layers=None):
    """Some or all layers of experts [L, E, ...]."""
    shapes = shapes_like(experts)
    make_folder(folder, shapes, shapes.w_gate.shape[0])
    for layer in range(shapes.w_gate.shape[0]) if layers is None else layers:
        with write_layer(folder, layer, shapes, MODEL) as put:
            for name, leaf in zip(layer_tensors(shapes), jax.tree.leaves(experts), strict=True):
                for expert in range(leaf.shape[1]):
                    put(name, expert, np.asarray(leaf[layer, expert]))


def on_disk(folder, experts):
    """The same, opened."""
    write(folder, experts)
    return open_experts(folder, shapes_like(experts), MODEL)
