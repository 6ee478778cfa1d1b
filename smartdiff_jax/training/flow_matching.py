"""Trains the diffusion transformer, and the text encoder with it, by flow matching (Lipman et al., arXiv 2210.02747).

    x = (1 - sigma) data + sigma noise,    loss = |v(x, 1000 sigma, text) - (noise - data)|^2

sigma is the logistic of a normal variable, bent by the shift that sampling uses too (arXiv 2403.03206): high noise, where only
the text says what to draw, gets most of the steps. Its quantiles are spread evenly over each batch. A share of the captions
is empty, for classifier-free guidance.

What made earlier small models deaf to their text is avoided in how each family starts (`trainees`): words are tokens, the text
reaches every block from the first step at full scale, and the text encoder is given the order of words.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Int
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from smartdiff_jax.kernels import DIFFERENTIABLE
from smartdiff_jax.models.family import Conditioning
from smartdiff_jax.models.text.source import TextSource
from smartdiff_jax.samplers.base import NUM_TRAIN_TIMESTEPS
from smartdiff_jax.sharding.context_parallel import LocalAttend
from smartdiff_jax.stages.text import text_states
from smartdiff_jax.training.devices import BY_ROW, EVERYWHERE, Devices, mean
from smartdiff_jax.training.loop import StageSettings
from smartdiff_jax.training.pool import Pool
from smartdiff_jax.training.state import Component, Optimizer, Params, TrainState
from smartdiff_jax.training.trainees.base import EMBEDDING, TEXT_ENCODER, TRANSFORMER, Trainee

Rope = tuple[np.ndarray, np.ndarray]


class DenoiserSettings(StageSettings):
    """shift, sigma_mean, sigma_std: of the noise levels. attention: kernel, see `kernels.DIFFERENTIABLE`.
    recompute: keep only the outputs of matrix products for the backward pass; less memory traffic, more arithmetic.

    pool_size: clips kept, a multiple of part_calls * (batch size of the autoencoder). part_calls: batches encoded at once.
    variants: captions a clip. refresh_share: of the time, spent on encoding new clips once the pool is full (0: none);
    fill_share: the same while it is filling. embedding_lr_scale: of the word embeddings, each of which is seldom seen.
    muon: see `state.Optimizer`.
    """

    shift: PositiveFloat = 3.0
    sigma_mean: float = 0.0
    sigma_std: PositiveFloat = 1.2
    attention: str = "auto"
    recompute: bool = False
    pool_size: PositiveInt = 131_072
    part_calls: PositiveInt = 64
    variants: PositiveInt = 2
    refresh_share: NonNegativeFloat = Field(0.08, lt=1)
    fill_share: float = Field(0.5, gt=0, lt=1)
    embedding_lr_scale: PositiveFloat = 4.0
    muon: NonNegativeFloat = 0.0


def attend_with(name: str) -> LocalAttend:
    """A kernel with a gradient by name, as a block calls it on one device."""
    return LocalAttend(DIFFERENTIABLE[name])


def init(transformer: Component, text_encoder: Component, trainee: Trainee, seed: int) -> Params:
    """Fresh parameters of both, under one flat dictionary with a prefix each."""
    params = {TRANSFORMER + name: value for name, value in transformer.init(seed).items()}
    params |= {TEXT_ENCODER + name: value for name, value in text_encoder.init(seed + 1).items()}
    return trainee.start(params, transformer, text_encoder, seed)


def part_of(params: Params, prefix: str) -> Params:
    """The parameters of one of the two, without its prefix."""
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def told(source: TextSource, encoder: Any, ids: Int[Array, "b l"]) -> tuple[Float[Array, "b m d"], Int[Array, " b"] | None]:
    """States of the text (token 0 is padding), and how many count, where the model is told."""
    mask = (ids != 0).astype(jnp.int32)
    length = jnp.sum(mask, axis=1) - source.skip if source.buckets else None
    return text_states(source, encoder, ids, mask), length


def draw_sigmas(key: Array, n: int, mean: float, std: float, shift: float) -> Float[Array, " n"]:
    """Noise levels in (0, 1), one from each of n equal slices of their distribution, in random order."""
    order, inside = jax.random.split(key)
    quantile = (jax.random.permutation(order, n) + jax.random.uniform(inside, (n,))) / n
    sigma = jax.nn.sigmoid(mean + std * ndtri(jnp.clip(quantile, 1e-6, 1 - 1e-6)))
    return shift * sigma / (1 + (shift - 1) * sigma)


def make_optimizer(settings: DenoiserSettings, rates: Mapping[str, float]) -> Optimizer:
    """The optimizer of this stage. rates: of the family, see `Trainee`."""
    rates = {EMBEDDING: settings.embedding_lr_scale, **rates}
    return Optimizer(settings.weight_decay, settings.gamma, rates, settings.muon)


def make_call(
    transformer: Component,
    text_encoder: Component,
    source: TextSource,
    settings: DenoiserSettings,
    optimizer: Optimizer,
    ropes: tuple[Rope, Rope | None],
    seed: int,
    devices: Devices,
) -> Callable[[TrainState, Any, Pool, Any], tuple[TrainState, Array]]:
    """The compiled call: (state, learning rate, pool, how many samples of each device's part count) to the state after k steps
    and the loss.

    source: of the text. ropes: rotary tables of the tokens, and of the text where it has positions. devices: each draws its
    part of a batch from its own part of the pool.
    """
    attend, batch = attend_with(settings.attention), settings.batch_size
    rope, text_rope = jax.tree.map(lambda table: jnp.asarray(table)[None], ropes)

    def loss(params: Params, data: Array, ids: Array, key: Array) -> Array:
        sigma_key, noise_key = jax.random.split(key)
        sigma = devices.own(draw_sigmas(sigma_key, batch, settings.sigma_mean, settings.sigma_std, settings.shift))
        noise = devices.noise(noise_key, batch, data.shape[1:])
        data = data.astype(jnp.float32)
        mixed = data + sigma[:, None, None] * (noise - data)
        text, length = told(source, text_encoder.module(part_of(params, TEXT_ENCODER)), ids)
        model = transformer.module(part_of(params, TRANSFORMER))
        conditioning = Conditioning(text, rope, text_rope, length)
        hidden, context = model.embed(mixed, sigma * NUM_TRAIN_TIMESTEPS, conditioning)

        def run(hidden: Any, context: Any, block: int) -> Any:
            return model.run_blocks(hidden, context, attend, block, block + 1)

        if settings.recompute:
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            run = jax.checkpoint(run, policy=policy, static_argnums=2)
        # One block a call and not one scan over all: a scan would write out every intermediate for the backward pass.
        for block in range(model.num_blocks):
            hidden = run(hidden, context, block)
        return jnp.mean(jnp.square(model.head(hidden, context) - (noise - data)))

    def call(state: TrainState, rate: Array, pool: Pool, filled: Array) -> tuple[TrainState, Array]:
        def step(state: TrainState, _: Any) -> tuple[TrainState, Array]:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            row_key, variant_key, key = jax.random.split(key, 3)
            rows = devices.own(jax.random.randint(row_key, (batch,), 0, filled))
            variants = devices.own(jax.random.randint(variant_key, (batch,), 0, pool.text.shape[1]))
            ids = pool.text[rows, variants].astype(jnp.int32)
            value, gradients = mean(jax.value_and_grad(loss)(state.params, pool.tokens[rows], ids, key))
            state, _ = optimizer.apply(state, gradients, rate)
            return state, value

        state, values = jax.lax.scan(step, state, length=settings.steps_per_call)
        return state, jnp.mean(values)

    split = devices.each(call, (EVERYWHERE, EVERYWHERE, BY_ROW, EVERYWHERE), EVERYWHERE)
    return jax.jit(split, donate_argnums=0)
