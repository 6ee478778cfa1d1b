"""What the multistep solvers share: the flow as an exponential integrator over the half log-SNR.

With alpha = 1 - sigma and lambda = log(alpha / sigma), the exact solution between two noise levels s > t is

    x_t = (sigma_t / sigma_s) x_s + alpha_t * integral of exp(lambda - lambda_t) m(lambda) over lambda_s..lambda_t

where m is the predicted data, m = x - sigma * velocity. (DPM-Solver++, Lu et al. 2022, arXiv:2211.01095, eq. 8.)

For flow matching everything has a closed form in sigma, used here instead of differences of logarithms: the weight of
a constant m is alpha_t (1 - exp(-h)) = 1 - sigma_t / sigma_s, and h = lambda_t - lambda_s as in `log_snr_step`. That is
exact to float32 even where lambda itself is -14 (sigma near 1) and a step is 0.01, and finite at sigma = 0.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smartdiff_jax.samplers.base import Schedule

SMALLEST = 2.0**-24  # the least 1 - sigma above zero in float32; keeps lambda finite at sigma = 0 and sigma = 1


def data_prediction(
    latents: Float[Array, "*shape"], velocity: Float[Array, "*shape"], sigma: Float[Array, ""]
) -> Float[Array, "*shape"]:
    """The clean sample that a velocity points at, float32."""
    return latents.astype(jnp.float32) - sigma * velocity.astype(jnp.float32)


def sigma_ratio(schedule: Schedule, index: Int[Array, ""]) -> Float[Array, ""]:
    """sigmas[index + 1] / sigmas[index]; 1 past the end, where a step must change nothing."""
    sigma, following = schedule.sigmas[index], schedule.sigmas[index + 1]
    return jnp.where(sigma > 0, following / jnp.where(sigma > 0, sigma, 1.0), 1.0)


def log_snr_step(schedule: Schedule, index: Int[Array, ""]) -> Float[Array, ""]:
    """h = lambda(sigmas[index + 1]) - lambda(sigmas[index]): positive, finite even at the ends of the table."""
    sigma, following = schedule.sigmas[index], schedule.sigmas[index + 1]
    scale = jnp.maximum(following, SMALLEST) * jnp.maximum(1.0 - sigma, SMALLEST)
    return jnp.maximum(jnp.log1p((sigma - following) / scale), SMALLEST)


def predict(
    latents: Float[Array, "*shape"],
    data: Float[Array, "*shape"],
    previous_data: Float[Array, "*shape"],
    schedule: Schedule,
    index: Int[Array, ""],
) -> Float[Array, "*shape"]:
    """One step of DPM-Solver++(2M), midpoint; UniP-2 (bh2) is the same formula.

    data, previous_data: the data predictions at sigmas[index] and sigmas[index - 1].
    The first step has no previous one and the last lands on sigma = 0, where m is extrapolated over an infinite h:
    both are of first order.
    """
    first_order = (index < 1) | (index >= schedule.num_steps - 1)
    slope = 0.5 * log_snr_step(schedule, index) / log_snr_step(schedule, jnp.maximum(index - 1, 0))
    slope = jnp.where(first_order, 0.0, slope)
    ratio = sigma_ratio(schedule, index)
    return ratio * latents + (1.0 - ratio) * (data + slope * (data - previous_data))
