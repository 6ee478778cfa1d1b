"""Patches: an exact inverse, and the two orders of features that upstream has."""

import jax.numpy as jnp
import numpy as np
import pytest

from smartdiff_jax.models.patches import Patches


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("shape, size", [((2, 3, 3, 4, 6), (1, 2, 2)), ((1, 2, 4, 5, 9), (2, 1, 3))])
def test_unpack_is_the_inverse_of_pack(shape, size, channels_first):
    patches = Patches(size, channels_first)
    latents = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    tokens = patches.pack(latents)
    grid = patches.grid(shape)
    assert tokens.shape == (shape[0], np.prod(grid), np.prod(size) * shape[1])
    np.testing.assert_array_equal(patches.unpack(tokens, grid), latents)


def test_features_are_ordered_as_upstream_has_them():
    latents = jnp.arange(2 * 2 * 4, dtype=jnp.float32).reshape(1, 2, 1, 2, 4)
    second = {False: [2, 10, 3, 11, 6, 14, 7, 15], True: [2, 3, 6, 7, 10, 11, 14, 15]}
    for channels_first, features in second.items():
        np.testing.assert_array_equal(Patches((1, 2, 2), channels_first).pack(latents)[0, 1], features)
