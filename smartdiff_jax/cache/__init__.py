"""Feature caches, one file a policy."""

from smartdiff_jax.cache.auto import Auto
from smartdiff_jax.cache.base import CachePolicy
from smartdiff_jax.cache.blockdance import BlockDance
from smartdiff_jax.cache.cfgcache import CFGCache
from smartdiff_jax.cache.ditango import DiTango
from smartdiff_jax.cache.easycache import EasyCache
from smartdiff_jax.cache.first_block import DualBlockCache, FirstBlockCache
from smartdiff_jax.cache.magcache import MagCache
from smartdiff_jax.cache.meancache import MeanCache
from smartdiff_jax.cache.none import NoCache
from smartdiff_jax.cache.pab import PyramidAttentionBroadcast
from smartdiff_jax.cache.schedule import Schedule
from smartdiff_jax.cache.taylorseer import TaylorSeer
from smartdiff_jax.cache.teacache import TeaCache
from smartdiff_jax.cache.tokencache import TokenCache
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.registry import Registry

POLICIES: Registry[type[CachePolicy]] = Registry(
    "cache",
    {
        "none": NoCache,
        "auto": Auto,
        "teacache": TeaCache,
        "magcache": MagCache,
        "fbcache": FirstBlockCache,
        "dbcache": DualBlockCache,
        "blockdance": BlockDance,
        "taylorseer": TaylorSeer,
        "easycache": EasyCache,
        "meancache": MeanCache,
        "schedule": Schedule,
        "pab": PyramidAttentionBroadcast,
        "cfgcache": CFGCache,
        "tokencache": TokenCache,
        "ditango": DiTango,
    },
    error=InvalidRequest,
)
