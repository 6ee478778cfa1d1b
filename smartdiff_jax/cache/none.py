"""The exact path: every block at every step."""

import dataclasses

import jax

from smartdiff_jax.cache.base import CachePolicy


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoCache(CachePolicy):
    """Computes always and remembers nothing."""
