"""Token-selective caching (Jano and Cubic, arXiv 2603.00519): compute those tokens again that have changed most by now.

    whole steps       all tokens are computed; of every block the keys and values are remembered
    steps in between  one, two or three quarters of the tokens are computed, or none: those of highest c * age

age counts the steps since a token was computed, and c = |v - v before| / age of then is how fast its guided velocity changed
between the last two times: what a token is expected to be off by. Chosen tokens attend to all, to the others by the keys and
values that are remembered of them; the others keep what the blocks added to their stream last. Text is always computed.

Published: a score for each region of the picture (of latents and velocities; the package that computes it was not), whole
steps to measure it, then an update interval for each region that falls with it, and keys and values as here. Here: the same
for each token by itself, as a rank instead of an interval, so that a step has one of four sizes known to the compiler; every
device chooses among its own tokens, as many as the others do. Memory is published: keys and values of every block, 6 GB a
branch for Wan 2.1 1.3B at 480p, 62 GB for 14B at 720p.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from pydantic import Field

from smartdiff_jax.cache.base import CachePolicy, Evaluate, Hidden, Outlook, Stack, State, Step
from smartdiff_jax.cache.block_cache import picture
from smartdiff_jax.cache.guards import COMPUTE, Counters, Guarded, GuardParams, Guards
from smartdiff_jax.cache.params import MAX_STEPS, ModelNumbers, check_numbers, check_params

WHOLE = 4
"""Quarters of all tokens."""
WHOLE_SHARE = 0.75
"""Of a budget, what goes to whole steps (docs/decisions/0073)."""
LEAST_SPEED = 1e-12
"""Of tokens that nothing is known of: they go by their age."""


class TokenCacheParams(GuardParams):
    """quarters: of the tokens that are computed at a step that is not whole; 4 makes all whole. interval: every so many steps
    one is whole. mask: 1 makes a step whole, -1 does not, 0 leaves it to the interval."""

    quarters: int = Field(1, ge=0, le=WHOLE)
    interval: int = Field(3, ge=1, le=MAX_STEPS)
    warmup: int = Field(4, ge=0, le=MAX_STEPS)
    cooldown: int = Field(1, ge=0, le=MAX_STEPS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenMemory:
    """A branch's memory. begun: whether there is anything in it.

    keys: see `Stack.keys`. residual: what the blocks added to each token's stream last, and to the text's.
    age: [b, s, 1], steps since each token was computed. speed: [b, s, 1], of its guided velocity, by step.
    """

    counters: Counters
    begun: Any
    keys: Any
    residual: Any
    age: Any
    speed: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCache(Guarded):
    """quarters: of the tokens, at each step that is not whole."""

    guards: Guards
    interval: Int[Array, ""]
    quarters: Int[Array, " max_steps"]

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "TokenCache":
        """Raises InvalidRequest for wrong parameters."""
        numbers = check_numbers(ModelNumbers, model_numbers, "tokencache")
        checked = check_params(TokenCacheParams, numbers.params | params)
        return cls(
            guards=Guards.create(checked, num_steps),
            interval=jnp.int32(checked.interval if checked.quarters < WHOLE else 1),
            quarters=jnp.full(MAX_STEPS, checked.quarters, jnp.int32),
        )

    def within(self, outlook: Outlook) -> tuple[CachePolicy, tuple[str, ...]]:
        """A ratio counts tokens: the budget goes to whole steps, evenly spread, and in quarters to all the others."""
        if outlook.ratio is None:
            return self, ()
        assert outlook.budget is not None
        steps, budget = outlook.num_steps, outlook.budget
        forced = int(self.guards.within(outlook).forced(outlook).sum())
        # Steps that are not whole take three quarters at most.
        whole = max(forced, WHOLE * budget - (WHOLE - 1) * steps, round(WHOLE_SHARE * budget))
        guards = self.guards.within(dataclasses.replace(outlook, ratio=1.0 - whole / steps), evenly=True)
        some = np.flatnonzero(np.asarray(guards.mask)[:steps] != COMPUTE)
        quarters = np.zeros(MAX_STEPS, np.int32)
        quarters[some] = np.diff(np.arange(len(some) + 1) * WHOLE * (budget - whole) // max(1, len(some)))
        fitted = dataclasses.replace(self, guards=guards, quarters=jnp.asarray(quarters))
        return fitted, ("cache: the ratio counts tokens; 1, 2 and 3 are steps that compute so many quarters of them",)

    def init_stack(self, stack: Stack) -> TokenMemory:
        def zeros(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

        of_token = jnp.zeros((*picture(stack.hidden).shape[:2], 1))
        return TokenMemory(Counters.zero(), jnp.bool_(False), zeros(stack.keys()), zeros(stack.hidden), of_token, of_token)

    def blocks(self, state: TokenMemory, step: Step, stack: Stack) -> tuple[Hidden, State, Float[Array, ""]]:
        is_whole, counters = self.guards.decide(state.counters, step, step.index % self.interval == 0, state.begun)
        quarters = jnp.where(is_whole, WHOLE, self.quarters[step.index])
        hidden, age = stack.hidden, state.age + 1.0
        priority = jnp.maximum(state.speed, LEAST_SPEED) * age
        if step.token_weights is not None:
            priority = jnp.where(step.token_weights[:, None] > 0, priority, -1.0)

        def none(kept):
            return jax.tree.map(jnp.add, hidden, kept[0]), kept

        def some(share, kept):
            residual, keys, age = kept
            chosen = stack.choose(priority, share)
            rows, keys = stack.run_tokens(keys, chosen)
            residual = chosen.put(residual, jax.tree.map(jnp.subtract, rows, chosen.pick(hidden)))
            age = chosen.put(age, jnp.zeros((*picture(rows).shape[:2], 1)))
            # From what is remembered now: read before, it would be copied.
            return jax.tree.map(jnp.add, hidden, residual), (residual, keys, age)

        def whole(kept):
            _, keys, age = kept
            out, keys = stack.run_tokens(keys)
            return out, (jax.tree.map(jnp.subtract, out, hidden), keys, jnp.zeros_like(age))

        sizes = none, *(partial(some, share / WHOLE) for share in range(1, WHOLE)), whole
        out, (residual, keys, age) = jax.lax.switch(quarters, sizes, (state.residual, state.keys, age))
        memory = TokenMemory(counters, jnp.bool_(True), keys, residual, age, state.speed)
        return out, memory, quarters / WHOLE

    def init_step(self, tokens: Float[Array, "b s p"]) -> Float[Array, "b s p"]:
        """The guided velocity of each token when it was computed last."""
        return jnp.zeros_like(tokens, jnp.float32)

    def step(
        self, state: State, inner: TokenMemory, step: Step, tokens: Float[Array, "b s p"], evaluate: Evaluate, num_branches: int
    ) -> tuple[Float[Array, "b s p"], State, State, Float[Array, " n"]]:
        # All branches choose alike, by the positive one's ages: what two of them are off by cancels in their difference.
        before = _first_branch(inner.age, tokens)
        velocity, _, inner, computed = evaluate(inner)
        moved = jnp.linalg.norm(velocity - state, axis=-1, keepdims=True) / (before + 1.0)
        is_new = _first_branch(inner.age, tokens) == 0.0
        speed = jnp.where(is_new, moved, _first_branch(inner.speed, tokens))
        copies = inner.speed.size // speed.size
        inner = dataclasses.replace(inner, speed=jnp.tile(speed, (copies, 1, 1)).reshape(inner.speed.shape))
        return velocity, jnp.where(is_new, velocity, state), inner, computed


def _first_branch(of_tokens: Float[Array, "n w s 1"], tokens: Float[Array, "b s p"]) -> Float[Array, "b s 1"]:
    """Of the positive branch, which comes first whether branches are apart or one batch."""
    return of_tokens.reshape(-1, *of_tokens.shape[2:])[: tokens.shape[0]]
