"""EasyCache (arXiv 2507.02860): compute again once the velocity is expected to have changed enough. Needs no calibration.

    a <- a + k |x_i - x_{i-1}| / |v_f|;  skip while a < threshold, else a <- 0
    k = |v_f - v_g| / |x_f - x_g|,  f the last computed step, g the computed one before it

Norms are L1, velocities those of the positive branch. A skipped velocity is v_f + (x_i - x_f).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from smartdiff_jax.cache.base import Step
from smartdiff_jax.cache.block_cache import Verdict
from smartdiff_jax.cache.distance import l1
from smartdiff_jax.cache.guards import GuardParams, Guards
from smartdiff_jax.cache.params import ModelNumbers, check_numbers, check_params
from smartdiff_jax.cache.step_cache import StepCache, StepMemory


class EasyCacheParams(GuardParams):
    """threshold: more skips more; 0 computes every step. retention: fraction of the steps, from the first on, that is computed.

    The defaults are published for Wan 2.1 at 50 steps.
    """

    threshold: float = Field(0.05, ge=0.0)
    retention: float = Field(0.2, ge=0.0, le=1.0)
    cooldown: int = Field(1, ge=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EasyCache(StepCache):
    """The k of one set of weights is not the other's: after a switch two steps are computed."""

    guards: Guards
    threshold: Float[Array, ""]

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "EasyCache":
        """Raises InvalidRequest for wrong parameters."""
        numbers = check_numbers(ModelNumbers, model_numbers, "easycache")
        checked = check_params(EasyCacheParams, numbers.params | params)
        warmup = max(checked.warmup, round(checked.retention * num_steps))
        guards = Guards.create(checked.model_copy(update={"warmup": warmup}), num_steps)
        return cls(guards=guards, threshold=jnp.float32(checked.threshold))

    def base(self, tokens: Float[Array, "b s p"]) -> Float[Array, "b s p"]:
        return tokens.astype(jnp.float32)

    def init_step(self, tokens: Float[Array, "b s p"]) -> StepMemory:
        like, numbers = jnp.zeros_like(tokens, jnp.float32), jnp.zeros(tokens.shape[0])
        reference = {"tokens": like, "velocity": like, "rate": numbers, "has_rate": jnp.bool_(False)}
        return dataclasses.replace(super().init_step(tokens), reference=reference, previous=like, score=numbers)

    def reference(
        self, memory: StepMemory, step: Step, tokens: Float[Array, "b s p"], positive: Float[Array, "b s p"]
    ) -> dict[str, Array]:
        before, velocity, tokens = memory.reference, positive.astype(jnp.float32), tokens.astype(jnp.float32)
        moved = l1(tokens - before["tokens"], step.token_weights)
        changed = l1(velocity - before["velocity"], step.token_weights)
        return {"tokens": tokens, "velocity": velocity, "rate": changed / moved, "has_rate": memory.anchors.count > 0}

    def judge(self, memory: StepMemory, step: Step, tokens: Float[Array, "b s p"]) -> Verdict:
        tokens, last = tokens.astype(jnp.float32), memory.reference
        moved = l1(tokens - memory.previous, step.token_weights)
        score = memory.score + last["rate"] * moved / l1(last["velocity"], step.token_weights)
        # One sample of a batch that wants to be computed is enough: no picture is the worse for its neighbours.
        threshold = self.guards.led(self.threshold, memory.counters, step)
        may_skip = last["has_rate"] & jnp.all(score < threshold)
        return Verdict(~may_skip, previous=tokens, score=score)
