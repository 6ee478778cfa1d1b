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
