"""Feature caches, one file a policy."""

from collections.abc import Callable

from smartdiff_jax.cache.base import CachePolicy
from smartdiff_jax.cache.none import NoCache
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.registry import Registry

POLICIES: Registry[Callable[[], CachePolicy]] = Registry("cache", {"none": NoCache}, error=InvalidRequest)
