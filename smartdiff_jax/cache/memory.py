"""What a cache remembers: the last few computed values of one stream, newest first.

Every published predictor is a linear combination of at most six of them, with weights that are mere numbers
(`cache.predict`); so one compiled program serves hold, Taylor, Newton and whatever comes next.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MAX_ANCHORS = 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Anchors:
    """A ring of H computed values, kept in order by shifting, which happens at computed steps only.

    values: any pytree, its leaves stacked on a leading axis [H, ...], newest first.
    at: float32 [H], where each was computed (a step's index, a noise level), zero behind `count`.
    count: int32, how many hold something.
    """

    # Not annotated with shapes: the loop stacks the memories of its branches, and asks for shapes alone.
    values: Any
    at: Any
    count: Any

    @classmethod
    def empty(cls, like: Any, size: int) -> "Anchors":
        """Room for `size` (1 to 6) values shaped as `like`."""
        if not 1 <= size <= MAX_ANCHORS:
            raise ValueError(f"size={size}: from 1 to {MAX_ANCHORS} anchors")
        values = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), like)
        return cls(values, jnp.zeros(size, jnp.float32), jnp.int32(0))

    @property
    def size(self) -> int:
        return self.at.shape[0]

    def push(self, value: Any, at: Float[Array, ""] | Int[Array, ""] | float | int) -> "Anchors":
        """Remember `value`, forget the oldest."""

        def shift(stacked, new):
            return jnp.concatenate([jnp.asarray(new, stacked.dtype)[None], stacked[:-1]])

        values = jax.tree.map(shift, self.values, value)
        return Anchors(values, shift(self.at, at), jnp.minimum(self.count + 1, self.size))

    def cleared(self, when: Bool[Array, ""]) -> "Anchors":
        """Nothing is remembered any more, where `when` says so. No value is touched: weights never reach behind `count`."""
        return Anchors(self.values, jnp.where(when, 0.0, self.at), jnp.where(when, 0, self.count))

    def predict(self, weights: Float[Array, " h"]) -> Any:
        """sum_h weights[h] * values[h], accumulated in float32, in the dtype that is stored."""

        def combine(stacked):
            # Summed term by term, not as a product of matrices: XLA makes one pass over the anchors of it, without a
            # float32 copy.
            terms = [weights[h] * stacked[h].astype(jnp.float32) for h in range(self.size)]
            return sum(terms[1:], terms[0]).astype(stacked.dtype)

        return jax.tree.map(combine, self.values)

    @property
    def newest(self) -> Any:
        """The last computed value (zeros before the first)."""
        return jax.tree.map(lambda stacked: stacked[0], self.values)
