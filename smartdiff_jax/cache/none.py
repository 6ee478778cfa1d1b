"""The exact path: every block at every step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from smartdiff_jax.cache.base import CachePolicy, Outlook
from smartdiff_jax.cache.params import CacheParams, check_params
from smartdiff_jax.errors import InvalidRequest


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoCache(CachePolicy):
    """Computes always and remembers nothing."""

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "NoCache":
        """Raises InvalidRequest for any parameter."""
        check_params(CacheParams, params)
        return cls()

    def within(self, outlook: Outlook) -> tuple[CachePolicy, tuple[str, ...]]:
        """Raises InvalidRequest for a ratio above 0."""
        if outlook.ratio:
            raise InvalidRequest("cache_ratio", outlook.ratio, 'nothing is skipped without a cache; use cache="auto"')
        return self, ()
