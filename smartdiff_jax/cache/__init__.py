"""Feature caches, one file a policy."""

from smartdiff_jax.cache.base import CachePolicy
from smartdiff_jax.cache.blockdance import BlockDance
from smartdiff_jax.cache.ditango import DiTango
from smartdiff_jax.cache.first_block import DualBlockCache, FirstBlockCache
from smartdiff_jax.cache.magcache import MagCache
from smartdiff_jax.cache.none import NoCache
from smartdiff_jax.cache.pab import PyramidAttentionBroadcast
from smartdiff_jax.cache.taylorseer import TaylorSeer
from smartdiff_jax.cache.teacache import TeaCache
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.registry import Registry

POLICIES: Registry[type[CachePolicy]] = Registry(
    "cache",
    {
        "none": NoCache,
        "teacache": TeaCache,
        "magcache": MagCache,
        "fbcache": FirstBlockCache,
        "dbcache": DualBlockCache,
        "blockdance": BlockDance,
        "taylorseer": TaylorSeer,
        "pab": PyramidAttentionBroadcast,
        "ditango": DiTango,
    },
    error=InvalidRequest,
)
