"""Sigma tables for flow matching, built on the host in NumPy and padded to MAX_STEPS.

A schedule is a falling grid on [0, 1], bent by the shift of Esser et al. (2024, arXiv:2403.03206, eq. 23):

    sigma' = shift * sigma / (1 + (shift - 1) * sigma)

A larger shift spends more steps at high noise. Each sampler lays its own grid, the one of its diffusers scheduler;
the arithmetic keeps that scheduler's precision and order, because timesteps that are cut to integers would otherwise
differ by one here and there.
"""

import jax.numpy as jnp
import numpy as np

from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.samplers.base import MAX_STEPS, NUM_TRAIN_TIMESTEPS, Schedule

SHIFT_RANGE = (0.01, 100.0)  # farther out, neighbouring sigmas would be one float32 number at 200 steps


def check_request(num_steps: int, shift: float) -> None:
    """Raises InvalidRequest unless num_steps is a whole number in 1..MAX_STEPS and shift in SHIFT_RANGE."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= MAX_STEPS:
        raise InvalidRequest("num_inference_steps", num_steps, f"give a whole number from 1 to {MAX_STEPS}")
    lowest, highest = SHIFT_RANGE
    if not lowest <= shift <= highest:  # NaN is in no range
        raise InvalidRequest("shift", shift, f"give a number from {lowest} to {highest}; 3 to 12 is usual")


def apply_shift(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Bends `sigmas` towards high noise (shift > 1) or low noise (shift < 1); 0 and 1 stay where they are."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def stretch(sigmas: np.ndarray, terminal: float | None) -> np.ndarray:
    """`sigmas` drawn out so that the last is `terminal` (None: as they are); 1 stays where it is."""
    if terminal is None or len(sigmas) == 1:  # one step begins at 1 and has nothing to end at
        return sigmas
    below_one = 1 - sigmas
    return 1 - below_one / (below_one[-1] / (1 - terminal))


def from_sigmas(sigmas: np.ndarray | list[float], timesteps: np.ndarray | list[float] | None = None) -> Schedule:
    """The padded tables of given sigmas.

    sigmas: the noise levels where the model is asked, falling, in (0, 1]; the final 0 is appended here.
    timesteps: what the model is told at each of them; sigma * 1000 if not given.
    Raises InvalidRequest if there are too many, or if they do not fall strictly in float32: a solver divides by their
    differences.
    """
    levels = np.asarray(sigmas, np.float32)
    num_steps = len(levels)
    if not 1 <= num_steps <= MAX_STEPS:
        raise InvalidRequest("sigmas", levels.tolist(), f"give 1 to {MAX_STEPS} of them, without the final 0")
    told = levels * np.float32(NUM_TRAIN_TIMESTEPS) if timesteps is None else np.asarray(timesteps, np.float32)
    padded_sigmas = np.zeros(MAX_STEPS + 1, np.float32)
    padded_sigmas[:num_steps] = levels
    padded_timesteps = np.zeros(MAX_STEPS, np.float32)
    padded_timesteps[:num_steps] = told
    if not (levels[0] <= 1 and np.all(np.diff(padded_sigmas[: num_steps + 1]) < 0)):
        raise InvalidRequest("sigmas", levels.tolist(), "they must fall strictly, from at most 1 to above 0")
    return Schedule(jnp.asarray(padded_sigmas), jnp.asarray(padded_timesteps), jnp.asarray(np.int32(num_steps)))
