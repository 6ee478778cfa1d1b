"""The ring of anchors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartdiff_jax.cache.memory import Anchors


def tree(number):
    return jnp.full((2, 3), number, jnp.float32), {"text": jnp.full((4,), -number, jnp.bfloat16)}


def filled(size, numbers):
    anchors = Anchors.empty(tree(0.0), size)
    for index, number in enumerate(numbers):
        anchors = anchors.push(tree(float(number)), jnp.int32(10 * index))
    return anchors


def test_the_newest_is_first_and_the_oldest_is_forgotten():
    anchors = filled(3, [1, 2, 3, 4])
    assert int(anchors.count) == 3 and anchors.at.tolist() == [30, 20, 10]
    assert anchors.values[0][:, 0, 0].tolist() == [4, 3, 2]
    assert anchors.values[1]["text"][:, 0].tolist() == [-4, -3, -2]
    assert anchors.newest[0][0, 0] == 4


@pytest.mark.parametrize("size", range(1, 7))
def test_count_stops_at_the_size(size):
    assert [int(filled(size, range(n)).count) for n in range(8)] == [min(n, size) for n in range(8)]


def test_predict_is_the_weighted_sum_in_the_stored_dtype():
    out = filled(3, [1, 2, 4]).predict(jnp.asarray([2.0, -1.5, 0.25]))
    assert out[0].dtype == jnp.float32 and out[1]["text"].dtype == jnp.bfloat16
    np.testing.assert_allclose(out[0], 2 * 4 - 1.5 * 2 + 0.25)
    np.testing.assert_allclose(out[1]["text"].astype(jnp.float32), -(2 * 4 - 1.5 * 2 + 0.25), rtol=1e-2)


def test_bfloat16_anchors_are_summed_in_float32():
    anchors = Anchors.empty(jnp.zeros(1, jnp.bfloat16), 3)
    for number in (1.0, 1.0, 1.0078125):
        anchors = anchors.push(jnp.full(1, number, jnp.bfloat16), 0)
    # In bfloat16 100 * 1.0078125 - 100 would be 1 (spacing 0.5) and each product would round on its own.
    assert float(anchors.predict(jnp.asarray([100.0, -100.0, 0.0]))[0]) == 0.78125


def test_one_weight_of_one_is_the_value_to_the_bit(key):
    value = jax.random.normal(key, (64,))
    anchors = Anchors.empty(value, 2).push(value + 1, 0).push(value, 1)
    assert np.array_equal(anchors.predict(jnp.asarray([1.0, 0.0])), value)


def test_clearing_forgets_only_when_asked():
    anchors = filled(2, [5, 6])
    kept, gone = anchors.cleared(jnp.bool_(False)), anchors.cleared(jnp.bool_(True))
    assert int(kept.count) == 2 and kept.at.tolist() == [10, 0]
    assert int(gone.count) == 0 and int(gone.push(tree(7.0), 3).count) == 1


@pytest.mark.parametrize("size", [0, 7])
def test_sizes_that_are_not_served(size):
    with pytest.raises(ValueError, match="from 1 to 6"):
        Anchors.empty(tree(0.0), size)


def test_a_pytree_that_jit_and_the_loop_carry():
    def body(index, anchors):
        return anchors.push(jax.tree.map(lambda leaf: leaf + 1, anchors.newest), index)

    anchors = jax.jit(lambda anchors: jax.lax.fori_loop(0, 5, body, anchors))(Anchors.empty(tree(0.0), 3))
    assert int(anchors.count) == 3 and anchors.values[0][:, 0, 0].tolist() == [5, 4, 3]
