"""Sorting by group, and moving rows there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.kernels.permute import permute, reference, sort_by_group, ungroup, unpermute

T, K, G, D = 13, 3, 6, 5


@pytest.fixture
def topk_idx():
    draw = np.random.default_rng(0)
    ids = np.stack([draw.permutation(G)[:K] for _ in range(T)])
    ids[4] = G  # a padded token
    ids[7, 1] = G + 3
    return jnp.asarray(ids, jnp.int32)


@pytest.mark.parametrize("copies", [1, 2], ids=["few", "many"])
@pytest.mark.parametrize("group_order", [None, (3, 1, 5, 0, 2, 4)])
def test_sort_equals_reference(topk_idx, group_order, copies):
    topk_idx = jnp.tile(topk_idx, (copies, 1))
    order = None if group_order is None else jnp.asarray(group_order, jnp.int32)
    fast = jax.jit(lambda ids: sort_by_group(ids, G, group_order=order))(topk_idx)
    slow = reference.sort_by_group(topk_idx, G, group_order=order)
    jax.tree.map(np.testing.assert_array_equal, fast, slow)


@pytest.mark.parametrize("copies", [1, 2], ids=["few", "many"])
def test_sort_is_stable_and_sentinels_come_last(topk_idx, copies):
    topk_idx = jnp.tile(topk_idx, (copies, 1))
    perm = sort_by_group(topk_idx, G)
    flat = np.asarray(topk_idx).reshape(-1)
    np.testing.assert_array_equal(perm.order, np.argsort(np.minimum(flat, G), kind="stable"))
    np.testing.assert_array_equal(perm.order[perm.inverse], np.arange(flat.size))
    np.testing.assert_array_equal(perm.group_sizes, np.bincount(flat, minlength=G)[:G])
    assert (flat[perm.order[int(perm.group_sizes.sum()) :]] >= G).all()


def test_group_order_permutes_sizes_and_rows(topk_idx):
    layout = jnp.asarray([3, 1, 5, 0, 2, 4], jnp.int32)
    plain, laid_out = sort_by_group(topk_idx, G), sort_by_group(topk_idx, G, group_order=layout)
    np.testing.assert_array_equal(laid_out.group_sizes, plain.group_sizes[layout])
    flat = np.asarray(topk_idx).reshape(-1)
    first = flat[laid_out.order[: int(plain.group_sizes[3])]]
    assert (first == 3).all() and first.size > 0


def moved(module):
    """Values and all gradients of there and back, with a weighting of rows in between."""

    def run(topk_idx, x, topk_weights, scale, ct):
        perm = sort_by_group(topk_idx, G)

        def there_and_back(x, topk_weights, scale):
            y = module.permute(x, perm, K) * scale
            return module.unpermute(y, perm, topk_weights)

        out, vjp = jax.vjp(there_and_back, x, topk_weights, scale)
        return out, vjp(ct)

    return jax.jit(run)


def test_values_and_gradients_equal_reference(topk_idx, key):
    import moejax.kernels.permute as fast

    keys = jax.random.split(key, 4)
    x, ct = jax.random.normal(keys[0], (T, D)), jax.random.normal(keys[1], (T, D))
    weights, scale = jax.random.uniform(keys[2], (T, K)), jax.random.normal(keys[3], (T * K, D))
    got = moved(fast)(topk_idx, x, weights, scale, ct)
    want = moved(reference)(topk_idx, x, weights, scale, ct)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)


def test_bits_do_not_depend_on_the_order_of_groups(topk_idx, key):
    y = jax.random.normal(key, (T, K, D))
    weights = jax.random.uniform(jax.random.fold_in(key, 1), (T, K))
    outs = []
    for layout in (jnp.arange(G, dtype=jnp.int32), jnp.asarray([3, 1, 5, 0, 2, 4], jnp.int32)):
        perm = sort_by_group(topk_idx, G, group_order=layout)
        rows = y.reshape(T * K, D)[perm.order]
        outs.append(np.asarray(unpermute(rows, perm, weights)))
    np.testing.assert_array_equal(outs[0], outs[1])


def test_gradients_hold_no_scatter_add(topk_idx, key):
    x, weights = jax.random.normal(key, (T, D)), jnp.ones((T, K))

    def loss(x, weights):
        perm = sort_by_group(topk_idx, G)
        return jnp.sum(unpermute(permute(x, perm, K), perm, weights) ** 2)

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, weights))
    assert "scatter-add" not in text and "gather" in text


def test_wrong_shapes_are_named(topk_idx):
    perm = sort_by_group(topk_idx, G)
    with pytest.raises(InputError, match=r"expected \[T, K\]"):
        sort_by_group(topk_idx[0], G)
    with pytest.raises(InputError, match=r"expected \(6,\)"):
        sort_by_group(topk_idx, G, group_order=jnp.arange(5))
    with pytest.raises(InputError, match="12 tokens, top_k=3, permutation has 39 rows"):
        permute(jnp.ones((T - 1, D)), perm, K)
    with pytest.raises(InputError, match="topk_weights has shape"):
        unpermute(jnp.ones((T * K, D)), perm, jnp.ones((T, K + 1)))


def test_ungroup_is_a_plain_gather_with_its_gradient(topk_idx, key):
    y, ct = jax.random.normal(key, (T * K, D)), jax.random.normal(key, (T, K, D))
    perm = sort_by_group(topk_idx, G)
    got, vjp = jax.vjp(lambda y: ungroup(y, perm, K), y)
    np.testing.assert_array_equal(got, y[perm.inverse].reshape(T, K, D))
    np.testing.assert_array_equal(vjp(ct)[0], ct.reshape(T * K, D)[perm.order])
    assert "scatter-add" not in str(jax.make_jaxpr(lambda ct: vjp(ct))(ct))
    with pytest.raises(InputError, match="y has 5 rows, permutation has 39"):
        ungroup(y[:5], perm, K)
