"""Rotary position embedding over several axes (RoFormer, arXiv 2104.09864), as data that travels with the tokens.

Tables are made on the host in float64 and handed over as float32, so a compiled model depends on the number of tokens
and not on the grid they came from. Pairs are interleaved: features 2i and 2i + 1 of a head turn together.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def axial_rope_table(
    grid: Sequence[int], axes_dim: Sequence[int], theta: float = 10_000.0
) -> tuple[Float[np.ndarray, "s r"], Float[np.ndarray, "s r"]]:
    """Cosines and sines of every point of a grid, first axis outermost.

    `axes_dim` says how many features of a head turn with each axis (all even); r = sum(axes_dim) / 2.
    """
    angles = []
    for axis, (size, dim) in enumerate(zip(grid, axes_dim, strict=True)):
        frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        shape = [1] * len(grid) + [dim // 2]
        shape[axis] = size
        along_axis = np.outer(np.arange(size), frequencies).reshape(shape)
        angles.append(np.broadcast_to(along_axis, (*grid, dim // 2)))
    table = np.concatenate(angles, axis=-1).reshape(-1, sum(axes_dim) // 2)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def apply_rope(
    x: Float[Array, "b s h d"], rope: tuple[Float[Array, "c s r"], Float[Array, "c s r"]], dtype: DTypeLike
) -> Float[Array, "b s h d"]:
    """Turn the pairs of each head, in float32; x is rounded to `dtype` before, as upstream's norms give it, and after. The
    table's batch is b or 1."""
    cos, sin = (table[:, :, None, :, None] for table in rope)
    pairs = x.astype(dtype).astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    # A reversed pair instead of two strided halves: XLA fuses this with the norm before it.
    return (pairs * cos + pairs[..., ::-1] * (sin * jnp.array([-1.0, 1.0]))).reshape(x.shape).astype(dtype)
