"""Euler's method on the flow ODE dx/dsigma = velocity.

Same sigmas, timesteps and steps as diffusers' FlowMatchEulerDiscreteScheduler(shift=shift), with dynamic shifting too, whose
exponential form is the same shift by exp(mu). Unusual, but so there: without a model's own spacing the lower end of the grid is
the smallest training sigma *after* the shift, and the grid is then shifted once more.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smartdiff_jax.samplers.base import NUM_TRAIN_TIMESTEPS, Schedule, Spacing
from smartdiff_jax.samplers.schedules import apply_shift, check_request, from_sigmas, stretch


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FlowEuler:
    """First order, no history. The timesteps are sigma * 1000, not rounded."""

    def schedule(self, num_steps: int, shift: float, spacing: Spacing = Spacing()) -> Schedule:
        check_request(num_steps, shift)
        if spacing.from_one:
            grid = np.linspace(1.0, 1.0 / num_steps, num_steps).astype(np.float32)
            return from_sigmas(stretch(np.minimum(apply_shift(grid, shift), 1.0), spacing.terminal))
        # the two ends of the training grid in float32, as diffusers keeps them
        ends = apply_shift(np.array([NUM_TRAIN_TIMESTEPS, 1], np.float32) / np.float32(NUM_TRAIN_TIMESTEPS), shift)
        first, last = ends.astype(np.float64) * NUM_TRAIN_TIMESTEPS
        sigmas = apply_shift(np.linspace(first, last, num_steps) / NUM_TRAIN_TIMESTEPS, shift)
        return from_sigmas(stretch(np.minimum(sigmas, 1.0), spacing.terminal))  # rounding may have led above 1

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
