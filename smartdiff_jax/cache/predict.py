"""Weights of the anchors for a value that is not computed: pure functions of where the anchors lie.

All take (at [H], count, position) and return float32 [H], zero behind `count`; `order` is traced too. With one anchor
each of them holds it. The positions may be step indices, noise levels or anything else that never comes twice.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Weights = Float[Array, " h"]
Order = Int[Array, ""] | Float[Array, ""] | int


def hold(at: Float[Array, " h"], count: Int[Array, ""], position: Float[Array, ""]) -> Weights:
    """The newest anchor, as it is."""
    return jnp.zeros_like(at).at[0].set(1.0)


def newton(at: Float[Array, " h"], count: Int[Array, ""], position: Float[Array, ""], order: Order) -> Weights:
    """Extrapolation by the polynomial through the newest min(count, order + 1) anchors, whatever their gaps.

    Newton's form with divided differences: exact for polynomials of that degree.
    """
    size = at.shape[0]
    return _extrapolate(at, count, position, order, lambda m, j: m + j + 1, lambda j: position - at[min(j, size - 1)])


def taylor(at: Float[Array, " h"], count: Int[Array, ""], position: Float[Array, ""], order: Order) -> Weights:
    """TaylorSeer's form (arXiv 2503.06923): F_0 + sum_j D_j k^j / j! with k the distance to the newest anchor.

    D_j is the difference of D_{j-1} between two updates over the gap of these two, which makes it a backward difference
    where a derivative is meant: exact up to degree 1; of a quadratic under equal gaps N it misses D_2 N k / 2.
    """
    return _extrapolate(at, count, position, order, lambda m, j: m + 1, lambda j: (position - at[0]) / (j + 1))


def forecast(
    at: Float[Array, " h"], count: Int[Array, ""], position: Float[Array, ""], order: Order, exact: Bool[Array, ""]
) -> Weights:
    """`newton` where `exact`, else `taylor`."""
    return jnp.where(exact, newton(at, count, position, order), taylor(at, count, position, order))


def mean_slope(
    at: Float[Array, " h"], count: Int[Array, ""], after: Float[Array, ""], following: Float[Array, ""], order: Order
) -> Weights:
    """MeanCache's form (arXiv 2601.19961): v_0 - J (following - after), with J the slope of v against its own mean.

        J = (v_m - u) / (after - at[m]),  u = mean of the velocities from at[m] to `after`,  m = min(order, count) - 1

    at: noise levels where the anchors' steps began, each ending where the next began and the newest at `after`. following: the
    noise level at the end of the step to predict. The mean weighs each velocity by the length of its step, which under
    Euler's method is the published (x(after) - x(at[m])) / (after - at[m]). With order 1 J is zero: v_0 is held. Where v is
    linear in the noise level and all steps are equal, this is (order - 1) / (2 order) of the way that it moves.
    """
    size = at.shape[0]
    oldest = jnp.clip(jnp.minimum(order, count), 1, size).astype(jnp.int32) - 1
    lengths = jnp.concatenate([after[None], at[:-1]]) - at
    within = jnp.arange(size) <= oldest
    span = after - at[oldest]
    mean = jnp.where(within, lengths, 0.0) / jnp.where(span == 0, 1.0, span)
    slope = ((jnp.arange(size) == oldest) - mean) / jnp.where(span == 0, 1.0, span)
    slope = jnp.where(oldest == 0, 0.0, slope)
    return hold(at, count, following) - slope * (following - after)


def _extrapolate(at, count, position, order, other, factor) -> Weights:
    """sum_j D_j prod_{i<j} factor(i), where D_{j+1} of anchor m is (D_j of m - D_j of m + 1) / (at[m] - at[other(m, j)]).

    The recursion runs over rows of weights instead of tensors.
    """
    size = at.shape[0]
    rows = list(jnp.eye(size, dtype=jnp.float32))
    last = jnp.minimum(order, count - 1)
    weights, scale = rows[0], jnp.float32(1.0)
    for j in range(size - 1):
        scale = scale * factor(j)
        # Only anchors that hold something are differences taken of: the others' gaps are zero.
        gaps = [jnp.where(j + m + 1 < count, at[m] - at[other(m, j)], 1.0) for m in range(size - 1 - j)]
        rows = [(rows[m] - rows[m + 1]) / gap for m, gap in enumerate(gaps)]
        weights = weights + jnp.where(j < last, scale, 0.0) * rows[0]
    return weights
