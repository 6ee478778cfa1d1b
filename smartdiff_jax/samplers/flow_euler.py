"""Euler's method on the flow ODE dx/dsigma = velocity.

Same sigmas, timesteps and steps as diffusers' FlowMatchEulerDiscreteScheduler(shift=shift). Unusual, but so there: the
lower end of the grid is the smallest training sigma *after* the shift, and the grid is then shifted once more.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smartdiff_jax.samplers.base import NUM_TRAIN_TIMESTEPS, Schedule
from smartdiff_jax.samplers.schedules import apply_shift, check_request, from_sigmas


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FlowEuler:
    """First order, no history. The timesteps are sigma * 1000, not rounded."""

    def schedule(self, num_steps: int, shift: float) -> Schedule:
        check_request(num_steps, shift)
        # the two ends of the training grid in float32, as diffusers keeps them
        ends = apply_shift(np.array([NUM_TRAIN_TIMESTEPS, 1], np.float32) / np.float32(NUM_TRAIN_TIMESTEPS), shift)
        first, last = ends.astype(np.float64) * NUM_TRAIN_TIMESTEPS
        sigmas = apply_shift(np.linspace(first, last, num_steps) / NUM_TRAIN_TIMESTEPS, shift)
        return from_sigmas(np.minimum(sigmas, 1.0))  # rounding may have led above 1

    def init(self, latents: Float[Array, "*shape"]) -> tuple[()]:
        return ()

    def step(
        self,
        state: tuple[()],
        latents: Float[Array, "*shape"],
        velocity: Float[Array, "*shape"],
        schedule: Schedule,
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "*shape"], tuple[()]]:
        difference = schedule.sigmas[index + 1] - schedule.sigmas[index]
        return latents.astype(jnp.float32) + difference * velocity.astype(jnp.float32), state
