"""Classifier-free guidance (Ho and Salimans, 2022): v = v_neg + scale * (v_pos - v_neg).

A wrapper around one evaluation of the model, never a flag inside it. At scale 1 the negative branch is not run at all; models
without guidance, or told their scale as an input, are handed one branch and pass through.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smartdiff_jax.cache.base import StandIn
from smartdiff_jax.config.model import SamplingDefaults
from smartdiff_jax.config.request import ResolvedParams
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.models.family import Conditioning
from smartdiff_jax.registry import Registry
from smartdiff_jax.samplers.base import MAX_STEPS, NUM_TRAIN_TIMESTEPS

CacheState = Any
Evaluate = Callable[[Array, Conditioning, CacheState], tuple[Array, CacheState, Array]]
"""(tokens [b s p], one branch, cache state) -> (velocity [b s p], cache state, the share that was computed)."""

Combine = Callable[[Array, Array, Array], Array]
"""(positive velocity, negative velocity, scale) -> velocity; the positive one exactly at scale 1."""


def combine_plain(positive: Float[Array, "b s p"], negative: Float[Array, "b s p"], scale: Float[Array, ""]) -> Array:
    """The formula above."""
    return negative + scale * (positive - negative)


def combine_keeping_token_norm(
    positive: Float[Array, "b s p"], negative: Float[Array, "b s p"], scale: Float[Array, ""]
) -> Array:
    """Qwen-Image: every token is scaled back to the norm it has in the positive branch."""
    guided = combine_plain(positive, negative, scale)
    norm = jnp.linalg.norm(guided, axis=-1, keepdims=True)
    return guided * jnp.where(norm > 0, jnp.linalg.norm(positive, axis=-1, keepdims=True) / norm, 1.0)


def combine_capping_norm(cap: float) -> Combine:
    """Z-Image: a sample's norm may exceed that of its positive branch by this factor."""

    def combine(positive: Array, negative: Array, scale: Array) -> Array:
        guided = combine_plain(positive, negative, scale)
        norm, highest = (jnp.sqrt(jnp.sum(x * x, axis=(1, 2), keepdims=True)) for x in (guided, positive))
        return guided * jnp.where(norm > cap * highest, cap * highest / norm, 1.0)

    return combine


def combine_for(sampling: SamplingDefaults) -> Combine:
    """How this model's branches are put together."""
    if sampling.guidance_norm == "per_token":
        return combine_keeping_token_norm
    return combine_plain if sampling.guidance_norm is None else combine_capping_norm(sampling.guidance_norm)


@runtime_checkable
class Guidance(Protocol):
    """How the branches run. Leaves of `branches` are [n ...], positive first, n = 1 where there is no guidance.

    The cache state has a leading axis of `num_states(n)`. stand_in: instead of the negative branch. Returns the guided
    velocity, those of the branches, the state, and the share of each branch that was computed.
    """

    def num_states(self, num_branches: int) -> int: ...

    def __call__(
        self, evaluate: Evaluate, combine: Combine, tokens: Float[Array, "b s p"], branches: Conditioning,
        scale: Float[Array, ""], state: CacheState, stand_in: StandIn | None = None,
    ) -> tuple[Float[Array, "b s p"], Float[Array, "n b s p"], CacheState, Float[Array, " n"]]: ...  # fmt: skip


class Sequential:
    """One branch after the other through one copy of the model: half the activations, and one sample fills a GPU anyway."""

    def num_states(self, num_branches):
        return num_branches

    def __call__(self, evaluate, combine, tokens, branches, scale, state, stand_in=None):
        num_branches = branches.text.shape[0]

        def branch(index, carry):
            velocities, state, computed = carry
            own = jax.tree.map(lambda leaf: leaf[index], state)
            velocity, own, done = evaluate(tokens, jax.tree.map(lambda leaf: leaf[index], branches), own)
            state = jax.tree.map(lambda leaf, new: leaf.at[index].set(new), state, own)
            return velocities.at[index].set(velocity), state, computed.at[index].set(done)

        carry = jnp.zeros((num_branches, *tokens.shape), tokens.dtype), state, jnp.zeros(num_branches)
        if num_branches == 1:
            velocities, state, computed = branch(0, carry)
            return velocities[0], velocities, state, computed
        # How many branches run is a number of rounds: to skip one takes no second copy of the model.
        skips = (scale == 1.0) if stand_in is None else (scale == 1.0) | stand_in.when
        velocities, state, computed = jax.lax.fori_loop(0, jnp.where(skips, 1, 2), branch, carry)
        if stand_in is not None:
            predicted = stand_in.predict(velocities[0]).astype(velocities.dtype)
            velocities = velocities.at[1].set(jnp.where(stand_in.when, predicted, velocities[1]))
        return _combined(combine, velocities[0], velocities[1], scale), velocities, state, computed


class Batched:
    """Both branches as one batch: for models too small to fill a device, and for meshes that give each branch its devices.

    place: puts the tokens of all branches [n * b, s, p] where they belong on a mesh.
    The negative branch runs at scale 1 too, where its result is not used, and nothing can stand in for it.
    """

    def __init__(self, place: Callable[[Array], Array] = lambda tokens: tokens):
        self._place = place

    def num_states(self, num_branches):
        return 1

    def __call__(self, evaluate, combine, tokens, branches, scale, state, stand_in=None):
        if stand_in is not None:
            remedy = "both branches run as one batch here; take another cache, or start without mesh.cfg and guidance=batched"
            raise InvalidRequest("cache", "cfgcache", remedy)
        num_branches, batch = branches.text.shape[0], tokens.shape[0]
        own = jax.tree.map(lambda leaf: leaf[0], state)
        wide = self._place(jnp.tile(tokens, (num_branches, 1, 1)))
        velocity, own, done = evaluate(wide, as_batch(branches, batch), own)
        state, computed = jax.tree.map(lambda leaf: leaf[None], own), jnp.broadcast_to(jnp.float32(done), num_branches)
        velocities = velocity.reshape(num_branches, *tokens.shape)
        if num_branches == 1:
            return velocity, velocities, state, computed
        return _combined(combine, velocities[0], velocities[1], scale), velocities, state, computed


def _combined(combine: Combine, positive: Array, negative: Array, scale: Array) -> Array:
    """At scale 1 the positive branch to the bit, whatever the negative one holds."""
    return jnp.where(scale == 1.0, positive, combine(positive, negative, scale))


def as_batch(branches: Conditioning, batch: int) -> Conditioning:
    """All branches as one: leaves [n b ...] or [n 1 ...] to [n * batch ...]."""

    def merge(leaf):
        wide = jnp.broadcast_to(leaf, (leaf.shape[0], batch, *leaf.shape[2:]))
        return wide.reshape(-1, *leaf.shape[2:])

    return jax.tree.map(merge, branches)


GUIDANCE: Registry[Callable[[Callable[[Array], Array]], Guidance]] = Registry(
    "guidance", {"sequential": lambda place: Sequential(), "batched": Batched}
)


def guidance_table(
    params: ResolvedParams, defaults: SamplingDefaults, timesteps: np.ndarray, ends: list[int]
) -> Float[np.ndarray, " max_steps"]:
    """Guidance scale by step, 1 where there is none: the first expert's, then the second's."""
    table = np.full(MAX_STEPS, params.guidance_scale, np.float32)
    if params.guidance_scale_2 is not None:
        table[ends[0] :] = params.guidance_scale_2
    table += np.float32(1.0 - defaults.guidance_off)
    table[1.0 - timesteps / NUM_TRAIN_TIMESTEPS > defaults.guidance_truncation] = 1.0
    return table
