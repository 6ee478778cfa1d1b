"""CFG-cache (FasterCache, ICLR 2025, arXiv 2410.19355): predict the negative branch of guidance from the positive one.

    negative = positive + gain * (negative - positive) of the last step that computed both

The positive branch is computed at every step, so at most half of the work is saved. The published form weighs low and high
spatial frequencies of the difference apart; here both have one gain (docs/decisions/0040).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from pydantic import Field

from smartdiff_jax.cache.base import CachePolicy, Evaluate, Outlook, StandIn, State, Step
from smartdiff_jax.cache.guards import Counters, Guarded, GuardParams, Guards
from smartdiff_jax.cache.memory import Anchors
from smartdiff_jax.cache.params import LAST_TIMESTEP, MAX_STEPS, ModelNumbers, check_numbers, check_params
from smartdiff_jax.cache.step_cache import StepMemory
from smartdiff_jax.errors import InvalidRequest


class CFGCacheParams(GuardParams):
    """interval: both branches are computed every N-th step; 1 computes them always. below: and where the timestep (of 1000) is
    not below this. gain: of the difference; published are 1.1, and 1 where that would amplify too much."""

    interval: int = Field(5, ge=1, le=MAX_STEPS)
    below: float = Field(641.0, ge=0.0)
    gain: float = Field(1.0, ge=0.0, le=2.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CFGCache(Guarded):
    """Its memory is StepMemory, the anchor the difference of the branches, float32."""

    guards: Guards
    interval: Int[Array, ""]
    below: Float[Array, ""]
    gain: Float[Array, ""]

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "CFGCache":
        """Raises InvalidRequest for wrong parameters."""
        numbers = check_numbers(ModelNumbers, model_numbers, "cfgcache")
        checked = check_params(CFGCacheParams, numbers.params | params)
        return cls(
            guards=Guards.create(checked, num_steps),
            interval=jnp.int32(checked.interval),
            below=jnp.float32(checked.below),
            gain=jnp.float32(checked.gain),
        )

    def within(self, outlook: Outlook) -> tuple[CachePolicy, tuple[str, ...]]:
        """A step whose negative branch is skipped is half skipped: of these there are twice as many."""
        if outlook.ratio is None:
            return self, ()
        if outlook.ratio > 0.5:
            raise InvalidRequest("cache_ratio", outlook.ratio, "the negative branch is half of the work; give at most 0.5")
        late = LAST_TIMESTEP * outlook.sigmas[:-1] >= float(self.below)
        busy = late if "below" in outlook.given else None
        doubled = dataclasses.replace(outlook, ratio=min(2.0 * outlook.ratio, 1.0))
        return dataclasses.replace(self, guards=self.guards.within(doubled, busy, evenly=True)), ()

    def check_model(self, num_blocks: int, num_branches: int) -> None:
        if num_branches == 1:
            raise InvalidRequest("cache", "cfgcache", "there is no negative branch to skip here; take another cache")

    def init_step(self, tokens: Float[Array, "b s p"]) -> State:
        return StepMemory(Counters.zero(), Anchors.empty(tokens.astype(jnp.float32), 1))

    def step(
        self, state: StepMemory, inner: State, step: Step, tokens: Float[Array, "b s p"], evaluate: Evaluate, num_branches: int
    ) -> tuple[Float[Array, "b s p"], State, State, Float[Array, " n"]]:
        self.check_model(0, num_branches)
        anchors = state.anchors.cleared(step.changed_weights)
        wants_fresh = (step.timestep >= self.below) | (step.index % self.interval == 0)
        fresh, counters = self.guards.decide(state.counters, step, wants_fresh, anchors.count > 0)
        held = anchors.predict(self.gain[None])
        stand_in = StandIn(~fresh, lambda positive: positive + held)
        velocity, branches, inner, computed = evaluate(inner, stand_in)
        # At scale 1 the negative branch is not computed even if it may be.
        pushed = anchors.push(branches[1].astype(jnp.float32) - branches[0], step.index)
        anchors = jax.tree.map(lambda new, old: jnp.where(computed[1] > 0, new, old), pushed, anchors)
        return velocity, StepMemory(counters, anchors), inner, computed
