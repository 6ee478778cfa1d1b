"""UniPC of order 2, B(h) = exp(h) - 1 ("bh2"), for flow matching (Zhao et al. 2023, arXiv:2302.04867).

Same sigmas, timesteps and steps as diffusers' UniPCMultistepScheduler(prediction_type="flow_prediction",
use_flow_sigmas=True, flow_shift=shift) with its defaults, as the Wan checkpoints ship it.

Each velocity is used twice: to correct the latents it was computed at (UniC), then to predict the next (UniP). The
corrector therefore belongs to the previous interval, and its order is the one its predictor had there. The paper's 2x2
system for the corrector's weights has the solution in `_correct`; diffusers solves it numerically.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smartdiff_jax.samplers.base import NUM_TRAIN_TIMESTEPS, Schedule, Spacing
from smartdiff_jax.samplers.multistep import data_prediction, log_snr_step, predict, sigma_ratio
from smartdiff_jax.samplers.schedules import apply_shift, check_request, from_sigmas

FIRST_STEP_BACK = 1e-6  # diffusers starts this far below sigma = 1, for lambda to be finite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UniPCState:
    """History before step `index`. latents: corrected, at index - 1; data, older_data: at index - 1 and index - 2."""

    latents: Float[Array, "*shape"]
    data: Float[Array, "*shape"]
    older_data: Float[Array, "*shape"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FlowUniPC:
    """Second order predictor, third order corrector, one velocity a step."""

    def schedule(self, num_steps: int, shift: float, spacing: Spacing = Spacing()) -> Schedule:
        """The grid begins at 1 - 1e-6; timesteps are cut to whole numbers, so the first is 999."""
        check_request(num_steps, shift)
        sigmas = apply_shift(np.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, num_steps + 1)[:-1], shift)
        sigmas[0] -= FIRST_STEP_BACK
        return from_sigmas(sigmas, np.trunc(sigmas * NUM_TRAIN_TIMESTEPS))

    def init(self, latents: Float[Array, "*shape"]) -> UniPCState:
        zeros = jnp.zeros_like(latents, jnp.float32)
        return UniPCState(zeros, zeros, zeros)

    def step(
        self,
        state: UniPCState,
        latents: Float[Array, "*shape"],
        velocity: Float[Array, "*shape"],
        schedule: Schedule,
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "*shape"], UniPCState]:
        data = data_prediction(latents, velocity, schedule.sigmas[index])
        can_correct = (index >= 1) & (index < schedule.num_steps)
        corrected = jnp.where(can_correct, _correct(state, data, schedule, index), latents.astype(jnp.float32))
        following = predict(corrected, data, state.data, schedule, index)
        return following, UniPCState(corrected, data, state.data)


def _correct(
    state: UniPCState, data: Float[Array, "*shape"], schedule: Schedule, index: Int[Array, ""]
) -> Float[Array, "*shape"]:
    """The step into sigmas[index] once more, from the latents before it, now that its data prediction is known."""
    before = jnp.maximum(index - 1, 0)
    h = log_snr_step(schedule, before)
    h_before = log_snr_step(schedule, jnp.maximum(index - 2, 0))
    curvature = jnp.where(index >= 2, _curvature(h), 0.0)  # 0 leaves the first-order corrector, the trapezium rule
    old_weight = curvature * h / (h + h_before)
    new_weight = 0.5 * (1.0 + curvature * h) - old_weight
    old_difference = (state.data - state.older_data) * (h / h_before)
    mean = state.data + old_weight * old_difference + new_weight * (data - state.data)
    ratio = sigma_ratio(schedule, before)
    return ratio * state.latents + (1.0 - ratio) * mean


def _curvature(h: Float[Array, ""]) -> Float[Array, ""]:
    """(coth(h / 2) - 2 / h) / h, which is 1/6 at h = 0; by its series where the difference would cancel."""
    square = h * h
    series = 1 / 6 - square / 360 + square**2 / 15120 - square**3 / 604800
    large = jnp.maximum(h, 1.0)
    return jnp.where(h < 1.0, series, (1.0 / jnp.tanh(0.5 * large) - 2.0 / large) / large)
