"""How far one signal is from another."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def l1(signal: Float[Array, "b s d"], token_weights: Float[Array, " s"] | None = None) -> Float[Array, " b"]:
    """sum |signal| of each sample, in float32.

    token_weights: 1 for tokens that count, 0 for padding.
    """
    size = jnp.abs(signal.astype(jnp.float32))
    if token_weights is not None:
        size = size * token_weights[:, None].astype(jnp.float32)
    return jnp.sum(size, axis=(1, 2))


def relative_l1(
    new: Float[Array, "b s d"], old: Float[Array, "b s d"], token_weights: Float[Array, " s"] | None = None
) -> Float[Array, " b"]:
    """sum |new - old| / sum |old| of each sample, in float32; infinite or NaN where `old` is nothing.

    Both sums run over all tokens before they are divided, so that the number is the same however the tokens are split over
    devices.
    """
    new, old = new.astype(jnp.float32), old.astype(jnp.float32)
    return l1(new - old, token_weights) / l1(old, token_weights)
