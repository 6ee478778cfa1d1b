"""DPM-Solver++(2M) for flow matching (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

Same sigmas, timesteps and steps as diffusers' DPMSolverMultistepScheduler(algorithm_type="dpmsolver++",
solver_order=2, solver_type="midpoint", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smartdiff_jax.samplers.base import NUM_TRAIN_TIMESTEPS, Schedule, Spacing
from smartdiff_jax.samplers.multistep import data_prediction, predict
from smartdiff_jax.samplers.schedules import apply_shift, check_request, from_sigmas


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FlowDPMpp:
    """Second order with one velocity a step. History: the data prediction of the step before."""

    def schedule(self, num_steps: int, shift: float, spacing: Spacing = Spacing()) -> Schedule:
        """The grid begins at 0.999 before the shift; timesteps are cut to whole numbers."""
        check_request(num_steps, shift)
        grid = 1.0 - np.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, num_steps + 1)
        sigmas = np.flip(apply_shift(grid, shift))[:-1]
        return from_sigmas(sigmas, np.trunc(sigmas * NUM_TRAIN_TIMESTEPS))

    def init(self, latents: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.zeros_like(latents, jnp.float32)

    def step(
        self,
        state: Float[Array, "*shape"],
        latents: Float[Array, "*shape"],
        velocity: Float[Array, "*shape"],
        schedule: Schedule,
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        data = data_prediction(latents, velocity, schedule.sigmas[index])
        return predict(latents.astype(jnp.float32), data, state, schedule, index), data
