"""The weights of the predictors: polynomials they must reproduce, and by how much they must miss the others."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartdiff_jax.cache.predict import hold, newton, taylor

EVEN = [12.0, 8.0, 4.0, 0.0]
UNEVEN = [13.0, 12.0, 8.0, 3.0, 1.0, 0.0]

newton, taylor = jax.jit(newton), jax.jit(taylor)


def weights(rule, at, position, *order, size=6):
    padded = jnp.zeros(size).at[: len(at)].set(jnp.asarray(at, jnp.float32))
    return np.asarray(rule(padded, jnp.int32(len(at)), jnp.float32(position), *order), np.float64)


def predicted(rule, at, position, order, function):
    values = np.asarray([function(t) for t in at] + [np.nan] * 6)[:6]
    found = weights(rule, at, position, jnp.int32(order))
    assert not found[len(at) :].any()
    return float(np.sum(found[: len(at)] * values[: len(at)]))


@pytest.mark.parametrize("position", [1.0, 14.0, 20.5])
def test_hold_is_the_newest(position):
    assert weights(hold, [9.0, 4.0], position).tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("rule", [newton, taylor])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_one_anchor_is_held_and_order_zero_holds(rule, order):
    assert weights(rule, [7.0], 9.0, jnp.int32(order)).tolist() == [1, 0, 0, 0, 0, 0]
    assert weights(rule, UNEVEN, 15.0, jnp.int32(0)).tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("at", [UNEVEN, EVEN], ids=["uneven", "even"])
@pytest.mark.parametrize("degree", range(6))
def test_newton_is_exact_for_polynomials_of_its_order(at, degree):
    coefficients = np.random.RandomState(degree).uniform(0.5, 1, degree + 1) / 10.0 ** np.arange(degree + 1)
    function = np.polynomial.Polynomial(coefficients)
    order = min(degree, len(at) - 1)
    exact = predicted(newton, at, 15.0, order, function)
    if degree < len(at):
        np.testing.assert_allclose(exact, function(15.0), rtol=2e-5, atol=1e-5)
    if 0 < degree < len(at):
        assert abs(predicted(newton, at, 15.0, degree - 1, function) - function(15.0)) > 1e-3


def test_newton_is_lagrange():
    at, position = UNEVEN[:4], 15.5
    lagrange = []
    for i, t in enumerate(at):
        others = [Fraction(u) for j, u in enumerate(at) if j != i]
        lagrange.append(float(np.prod([(Fraction(position) - u) / (Fraction(t) - u) for u in others])))
    np.testing.assert_allclose(weights(newton, at, position, jnp.int32(3))[:4], lagrange, rtol=1e-5)


def test_the_order_is_cut_to_the_anchors_there_are():
    assert np.array_equal(weights(newton, EVEN[:2], 14.0, jnp.int32(5)), weights(newton, EVEN[:2], 14.0, jnp.int32(1)))


@pytest.mark.parametrize("degree", [0, 1])
@pytest.mark.parametrize("at", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_taylor_is_exact_up_to_degree_one(at, degree):
    function = np.polynomial.Polynomial([2.0, -0.5][: degree + 1])
    np.testing.assert_allclose(predicted(taylor, at, 15.0, max(degree, 1), function), function(15.0), rtol=1e-6)


@pytest.mark.parametrize("gap", [1, 2, 4])
@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_taylor_misses_a_quadratic_by_half_the_difference_times_gap_and_distance(gap, ahead):
    at = [2.0 * gap, 1.0 * gap, 0.0]
    position = at[0] + ahead
    second_difference = 2.0  # of t squared, over the gap squared
    miss = position**2 - predicted(taylor, at, position, 2, lambda t: t**2)
    np.testing.assert_allclose(miss, second_difference * gap * ahead / 2, rtol=1e-5)


def test_the_numbers_that_the_source_gives_for_a_quadratic():
    # Anchors at 0, 4, 8, two steps ahead: 92 where 100 is right.
    assert predicted(taylor, [8.0, 4.0, 0.0], 10.0, 2, lambda t: t**2) == pytest.approx(92)
    assert predicted(newton, [8.0, 4.0, 0.0], 10.0, 2, lambda t: t**2) == pytest.approx(100)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_is_the_recursion_over_factors(order):
    """As TaylorSeer keeps it: factors updated at each computed step, with that step's gap."""
    rng = np.random.RandomState(order)
    at = np.cumsum(rng.randint(1, 5, 5)).astype(float)
    values = rng.standard_normal(5)
    factors = [values[0]]
    for n in range(1, 5):
        new = [values[n]]
        for j in range(min(order, len(factors))):
            new.append((new[j] - factors[j]) / (at[n] - at[n - 1]))
        factors = new
    ahead = 3.0
    expected = sum(d * ahead**j / np.prod(np.arange(1, j + 1)) for j, d in enumerate(factors))
    found = weights(taylor, at[::-1], at[-1] + ahead, jnp.int32(order))
    np.testing.assert_allclose(found[:5] @ values[::-1], expected, rtol=1e-5)


@pytest.mark.parametrize("rule", [newton, taylor])
def test_weights_sum_to_one_and_need_no_step_units(rule):
    for count in range(1, 7):
        for order in range(6):
            found = weights(rule, UNEVEN[:count], 14.0, jnp.int32(order))
            assert found.sum() == pytest.approx(1, abs=1e-3)
            scaled = weights(newton, [t / 50 for t in UNEVEN[:count]], 14.0 / 50, jnp.int32(order))
            if rule is newton:
                np.testing.assert_allclose(scaled, found, rtol=1e-3, atol=1e-3)


def test_orders_and_counts_are_traced():
    traces = []

    @jax.jit
    def both(at, count, position, order):
        traces.append(1)
        return newton(at, count, position, order), taylor(at, count, position, order)

    for count in range(1, 5):
        for order in range(4):
            found = both(jnp.asarray(EVEN), jnp.int32(count), jnp.float32(14), jnp.int32(order))
            assert all(np.isfinite(row).all() for row in found)
    assert len(traces) == 1
