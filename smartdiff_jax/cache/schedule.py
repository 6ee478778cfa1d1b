"""Steps that are known beforehand, and the velocities of the others predicted: no decision, no measurement, exact latency.

The base of comparison for everything that decides: every N-th step, or a mask of one's own (published, planned, another run's).
Under Euler's method a held velocity is one step over the whole gap, so that this is also "fewer steps" on any noise levels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field

from smartdiff_jax.cache.base import Step
from smartdiff_jax.cache.block_cache import Verdict
from smartdiff_jax.cache.guards import GuardParams, Guards
from smartdiff_jax.cache.memory import MAX_ANCHORS, Anchors
from smartdiff_jax.cache.params import MAX_STEPS, ModelNumbers, check_numbers, check_params
from smartdiff_jax.cache.predict import hold, mean_slope, newton, taylor
from smartdiff_jax.cache.step_cache import StepCache, StepMemory

Predictor = Literal["hold", "mean", "newton", "taylor"]
PREDICTORS: tuple[str, ...] = get_args(Predictor)


class ScheduleParams(GuardParams):
    """interval: compute every N-th step after the warm-up, where `mask` does not say otherwise; 1 computes every step.

    predictor, order: see `cache.predict`. Of "newton" and "taylor" the order is the degree, of "mean" the number of steps that
    the slope is taken over; "hold" has none.
    along: what velocities are extrapolated over.
    """

    interval: int = Field(1, ge=1, le=MAX_STEPS)
    predictor: Predictor = "hold"
    order: int = Field(1, ge=0, le=MAX_ANCHORS)
    along: Literal["sigma", "step"] = "sigma"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule(StepCache):
    """Six anchors whatever the order: one executable for all predictors."""

    guards: Guards
    interval: Int[Array, ""]
    predictor: Int[Array, ""]
    order: Int[Array, ""]
    in_sigma: Bool[Array, ""]

    num_anchors: ClassVar[int] = MAX_ANCHORS
    evenly: ClassVar[bool] = True

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "Schedule":
        """Raises InvalidRequest for wrong parameters."""
        numbers = check_numbers(ModelNumbers, model_numbers, "schedule")
        checked = check_params(ScheduleParams, numbers.params | params)
        return cls(
            guards=Guards.create(checked, num_steps),
            interval=jnp.int32(checked.interval),
            predictor=jnp.int32(PREDICTORS.index(checked.predictor)),
            order=jnp.int32(checked.order),
            in_sigma=jnp.bool_(checked.along == "sigma"),
        )

    def judge(self, memory: StepMemory, step: Step, tokens: Float[Array, "b s p"]) -> Verdict:
        # The last step of the warm-up begins the first group.
        begins = jnp.maximum(self.guards.warmup, 1) - 1
        return Verdict((step.index - begins) % self.interval == 0)

    def weights(self, anchors: Anchors, step: Step) -> Float[Array, " h"]:
        steps, count = anchors.at, anchors.count
        sigmas = step.sigmas[steps.astype(jnp.int32)]
        at = jnp.where(self.in_sigma, sigmas, steps)
        here = jnp.where(self.in_sigma, step.sigmas[step.index], step.index.astype(jnp.float32))
        following = step.sigmas[steps[0].astype(jnp.int32) + 1], step.sigmas[step.index + 1]
        choices = (
            hold(at, count, here),
            mean_slope(sigmas, count, *following, self.order),
            newton(at, count, here, self.order),
            taylor(at, count, here, self.order),
        )
        # Numbers, not tensors: all are computed and one is taken.
        return jnp.stack(choices)[self.predictor]
