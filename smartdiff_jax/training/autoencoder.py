"""Trains the causal autoencoder on rendered scenes, videos or stills, and measures what its latents look like.

    loss = |x - y| + w_g (|dx/dt - dy/dt| + |dx/dh - dy/dh| + |dx/dw - dy/dw|) + w_kl KL(q(z|x) || N(0, 1))

All are means over elements; y is decoded from a sample of q. L1 keeps edges, and the differences make moving edges sharp;
there is no adversary. The whole clip goes through at once (`chunk=None`), always in one batch shape, because tuning the
convolutions costs more than a minute a shape on a GPU; everything else that encodes or decodes uses that batch shape too.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt32
from pydantic import NonNegativeFloat

from smartdiff_jax.models.family import Architecture
from smartdiff_jax.training.data.scenes import Scene, render
from smartdiff_jax.training.devices import BY_COLUMN, EVERYWHERE, Devices, mean
from smartdiff_jax.training.loop import StageSettings
from smartdiff_jax.training.state import Component, Optimizer, Params, TrainState

Bank = UInt32[Array, "images side side"]


class AutoencoderSettings(StageSettings):
    """kl_weight and gradient_weight: w_kl and w_g above."""

    kl_weight: NonNegativeFloat = 3e-5
    gradient_weight: NonNegativeFloat = 0.5


def component(architecture: Architecture, numbers: Mapping[str, Any], dtype: Any) -> Component:
    """The autoencoder as it is trained: latents as they are, and no clipping of pixels, which has no gradient."""
    neutral = Statistics.neutral(numbers["z_dim"])
    changes = {"latents_mean": neutral.mean, "latents_std": neutral.std, "clip_output": False}
    return Component.create(architecture, architecture.config.model_validate({**numbers, **changes}), dtype)


def init(vae: Component, num_frames: int, seed: int) -> Params:
    """Fresh parameters. Stills never reach the taps of a kernel that look at the frames before: those are zero."""
    params = vae.init(seed)
    if num_frames > 1:
        return params
    return {name: value.at[:, :, :-1].set(0) if value.ndim == 5 else value for name, value in params.items()}


def reconstruction_loss(x: Float[Array, "b t h w 3"], y: Float[Array, "b t h w 3"], gradient_weight: float) -> Float[Array, ""]:
    """L1 of the pixels and of their differences along time (where there is more than one frame), height and width."""
    error = y.astype(jnp.float32) - x.astype(jnp.float32)
    steps = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2, 3) if error.shape[axis] > 1)
    return jnp.mean(jnp.abs(error)) + gradient_weight * steps


def make_call(
    vae: Component, settings: AutoencoderSettings, optimizer: Optimizer, size: tuple[int, int], seed: int, devices: Devices
) -> Callable[[TrainState, Any, Bank, Scene], tuple[TrainState, Array]]:
    """The compiled call: (state, learning rate, bank, scenes [k, b, ...]) to the state after k steps and the mean loss.

    The noise depends on `seed` and the step, so a resumed run draws what it would have drawn. The scenes of a step are split
    over the devices.
    """

    def loss(params: Params, pixels: Array, key: Array) -> Array:
        module = vae.module(params)
        centre, logvar = module.encode(pixels, chunk=None)
        centre, logvar = centre.astype(jnp.float32), logvar.astype(jnp.float32)
        noise = devices.noise(key, len(centre) * devices.count, centre.shape[1:])
        latents = centre + jnp.exp(0.5 * logvar) * noise
        divergence = 0.5 * jnp.mean(centre**2 + jnp.exp(logvar) - 1 - logvar)
        restored = module.decode(latents, chunk=None)
        return reconstruction_loss(pixels, restored, settings.gradient_weight) + settings.kl_weight * divergence

    def call(state: TrainState, rate: Array, bank: Bank, scenes: Scene) -> tuple[TrainState, Array]:
        def step(state: TrainState, scene: Scene) -> tuple[TrainState, Array]:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            pixels = render(bank, scene, *size)
            value, gradients = mean(jax.value_and_grad(loss)(state.params, pixels, key))
            state, _ = optimizer.apply(state, gradients, rate)
            return state, value

        state, values = jax.lax.scan(step, state, scenes)
        return state, jnp.mean(values)

    split = devices.each(call, (EVERYWHERE, EVERYWHERE, EVERYWHERE, BY_COLUMN), EVERYWHERE)
    return jax.jit(split, donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel of the latents; the denoiser knows latents of mean 0 and deviation 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def neutral(cls, channels: int) -> "Statistics":
        """Leaves latents as they are."""
        return cls((0.0,) * channels, (1.0,) * channels)

    @classmethod
    def of(cls, latents: Float[np.ndarray, "n c f h w"]) -> "Statistics":
        """Measured, to four digits."""
        axes = (0, 2, 3, 4)
        mean, std = latents.mean(axes, dtype=np.float64), latents.std(axes, dtype=np.float64)
        return cls(*(tuple(round(float(number), 4) for number in numbers) for numbers in (mean, std)))

    def columns(self) -> tuple[Float[np.ndarray, "c 1 1 1"], Float[np.ndarray, "c 1 1 1"]]:
        """Shaped to act on latents [c, f, h, w]."""
        mean, std = (np.array(numbers, np.float32)[:, None, None, None] for numbers in (self.mean, self.std))
        return mean, std


class Codec:
    """Scenes to normalised latents and back to frames, each one executable, in batches of the training's size. All devices
    encode, one decodes.

    The statistics are arguments, so that what is compiled to measure them is not compiled again to use them.
    """

    def __init__(self, vae: Component, size: tuple[int, int], batch_size: int, devices: Devices):
        def encode(params: Params, bank: Bank, scenes: Scene, mean: Array, std: Array) -> Array:
            module = vae.module(params)

            def one(scene: Scene) -> Array:
                latents, _ = module.encode(render(bank, scene, *size), chunk=None)
                return ((latents.astype(jnp.float32) - mean) / std).astype(jnp.bfloat16)

            return jax.lax.map(one, scenes)

        def decode(params: Params, latents: Array, mean: Array, std: Array) -> Array:
            module, count = vae.module(params), len(latents)
            latents = jnp.pad(latents.astype(jnp.float32), ((0, -count % batch_size), *[(0, 0)] * 4)) * std + mean
            batches = latents.reshape(-1, batch_size, *latents.shape[1:])
            frames = jax.lax.map(lambda batch: to_uint8(module.decode(batch, chunk=None)), batches)
            return frames.reshape(-1, *frames.shape[2:])[:count]

        everywhere = (EVERYWHERE,) * 2
        self._encode = jax.jit(devices.each(encode, (*everywhere, BY_COLUMN, *everywhere), BY_COLUMN))
        self._decode = jax.jit(decode)
        self._render = jax.jit(lambda bank, scene: to_uint8(render(bank, scene, *size)))

    def encode(self, params: Params, bank: Bank, scenes: Scene, statistics: Statistics) -> Float[Array, "k b c f h w"]:
        """Scenes [k, b, ...] to the means of their clips, normalised, in bfloat16; params are on all devices, b is split."""
        return self._encode(params, bank, scenes, *statistics.columns())

    def decode(self, params: Params, latents: Float[Array, "n c f h w"], statistics: Statistics) -> UInt8[Array, "n t h2 w2 3"]:
        """Normalised latents to frames."""
        return self._decode(params, latents, *statistics.columns())

    def render(self, bank: Bank, scene: Scene) -> UInt8[Array, "n t h2 w2 3"]:
        """The true frames of scenes [n, ...]."""
        return self._render(bank, scene)


def to_uint8(pixels: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
    """[-1, 1] to 0..255."""
    return jnp.round(jnp.clip(pixels.astype(jnp.float32) * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def psnr(true: UInt8[np.ndarray, "n t h w 3"], restored: UInt8[np.ndarray, "n t h w 3"]) -> float:
    """Mean over clips, in dB; a clip that is equal to the bit counts as 60."""
    error = np.square(true.astype(np.float32) - restored).mean((1, 2, 3, 4)) / 255**2
    return float(np.mean(-10 * np.log10(np.maximum(error, 1e-6))))
