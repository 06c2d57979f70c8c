"""Fragments cover a model's weights once; taking and putting back is the identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.models.decoder import init_decoder
from moejax.sync.fragments import Part, by_layer, check_fragments, put, size, strided, take, whole
from tests.training.helpers import tiny_model


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(lambda: init_decoder(jax.random.key(0), tiny_model(num_layers=3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def test_layers_come_in_the_order_of_the_backward_pass(params):
    fragments = by_layer(params)
    check_fragments(params, fragments)
    assert len(fragments) == 3 and {part.rows for part in fragments[0]} == {(2,)}
    sizes = [size(params, fragment) for fragment in fragments]
    assert sizes[0] == sizes[1] < sizes[2]
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(params))
    two = strided(fragments, 2)
    check_fragments(params, two)
    assert [len(f) for f in two] == [len(fragments[0]) + len(fragments[2]), len(fragments[1])]
    check_fragments(params, whole(params))


def test_what_was_taken_is_put_back(params):
    leaves = jax.tree.leaves(params)
    blank = [jnp.zeros_like(leaf) for leaf in leaves]
    for fragment in strided(by_layer(params), 2):
        vector = take(leaves, fragment)
        assert vector.shape == (size(params, fragment),)
        blank = put(blank, fragment, vector)
    for a, b in zip(leaves, blank, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_rows_apart_are_taken_too():
    leaves = [jnp.arange(12.0).reshape(4, 3)]
    fragment = (Part(0, (0, 3)),)
    np.testing.assert_array_equal(take(leaves, fragment), [0, 1, 2, 9, 10, 11])
    (changed,) = put(leaves, fragment, -jnp.ones(6))
    np.testing.assert_array_equal(changed[:, 0], [-1, 3, 6, -1])


@pytest.mark.parametrize(
    "fragments, message",
    [
        ([(Part(0),), (Part(0), Part(1))], "leaf 0 is in fragments 0 and 1"),
        ([(Part(0),)], "of leaf 1, of shape"),
        ([(Part(0), Part(1, (0,)))], "of leaf 1, of shape"),
        ([(Part(2),)], "no leaf 2"),
    ],
)
def test_fragments_must_cover_all_once(fragments, message):
    with pytest.raises(InputError, match=message):
        check_fragments({"a": jnp.ones(2), "b": jnp.ones((2, 2))}, fragments)


def test_what_has_no_layers_is_refused():
    with pytest.raises(InputError, match="no leaf has 'groups' in its path"):
        by_layer({"a": jnp.ones(2)})
    with pytest.raises(InputError, match="count=3 must be between 1 and 2"):
        strided(((Part(0),), (Part(1),)), 3)
