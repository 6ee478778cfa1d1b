"""Classifier-free guidance (Ho and Salimans, 2022): v = v_neg + scale * (v_pos - v_neg).

A wrapper around one evaluation of the model, never a flag inside it. At scale 1 the negative branch is not run at all.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from smartdiff_jax.registry import Registry

CacheState = Any
Evaluate = Callable[[Array, Array, CacheState], tuple[Array, CacheState, Array]]
"""(tokens [b s p], text [b l d], cache state) -> (velocity [b s p], cache state, were the blocks computed)."""


@runtime_checkable
class Guidance(Protocol):
    """How the branches run. text is [2 b l d], positive first; state has a leading axis of `num_states`."""

    num_states: int

    def __call__(
        self, evaluate: Evaluate, tokens: Float[Array, "b s p"], text: Float[Array, "2 b l d"],
        scale: Float[Array, ""], state: CacheState,
    ) -> tuple[Float[Array, "b s p"], CacheState, Bool[Array, ""]]: ...  # fmt: skip


class Sequential:
    """One branch after the other through one copy of the model: half the activations, and one sample fills a GPU anyway."""

    num_states = 2

    def __call__(self, evaluate, tokens, text, scale, state):
        weights = jnp.stack([scale, 1.0 - scale])

        def branch(index, carry):
            total, state, _ = carry
            own = jax.tree.map(lambda leaf: leaf[index], state)
            velocity, own, computed = evaluate(tokens, text[index], own)
            state = jax.tree.map(lambda leaf, new: leaf.at[index].set(new), state, own)
            return total + weights[index] * velocity, state, computed

        branches = jnp.where(scale == 1.0, 1, 2)
        return jax.lax.fori_loop(0, branches, branch, (jnp.zeros_like(tokens), state, jnp.bool_(False)))


class Batched:
    """Both branches as one batch, for models too small to fill the device; a second copy of the model serves scale 1."""

    num_states = 1

    def __call__(self, evaluate, tokens, text, scale, state):
        batch = tokens.shape[0]

        def both(state):
            own = jax.tree.map(lambda leaf: leaf[0], state)
            velocity, own, computed = evaluate(jnp.tile(tokens, (2, 1, 1)), text.reshape(2 * batch, *text.shape[2:]), own)
            positive, negative = velocity[:batch], velocity[batch:]
            return negative + scale * (positive - negative), jax.tree.map(lambda leaf: leaf[None], own), computed

        def positive_only(state):
            # The state is shaped for two branches; its first half serves, its second half stays as it was.
            own = jax.tree.map(lambda leaf: leaf[0, :batch], state)
            velocity, own, computed = evaluate(tokens, text[0], own)
            return velocity, jax.tree.map(lambda leaf, new: leaf.at[0, :batch].set(new), state, own), computed

        return jax.lax.cond(scale == 1.0, positive_only, both, state)


GUIDANCE: Registry[Guidance] = Registry("guidance", {"sequential": Sequential(), "batched": Batched()})
