"""How far one signal is from another."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def relative_l1(
    new: Float[Array, "b s d"], old: Float[Array, "b s d"], token_weights: Float[Array, " s"] | None = None
) -> Float[Array, " b"]:
    """sum |new - old| / sum |old| of each sample, in float32; infinite or NaN where `old` is nothing.

    token_weights: 1 for tokens that count, 0 for padding. Both sums run over all tokens before they are divided, so that the
    number is the same however the tokens are split over devices.
    """
    new, old = new.astype(jnp.float32), old.astype(jnp.float32)
    difference, size = jnp.abs(new - old), jnp.abs(old)
    if token_weights is not None:
        difference, size = (x * token_weights[:, None].astype(jnp.float32) for x in (difference, size))
    return jnp.sum(difference, axis=(1, 2)) / jnp.sum(size, axis=(1, 2))
