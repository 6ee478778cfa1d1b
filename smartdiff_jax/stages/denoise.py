"""THE loop: where model, parallelism, kernel, cache policy and sampler meet, and nowhere else.

    host:    for chunk [lo, hi):  carry = run(weights, carry, tables, lo, hi)    progress, cancel, another job's turn
    device:  fori_loop(lo, hi):   velocity = guide(model); latents = sampler.step(latents, velocity)

Bounds, tables, guidance and the policy's numbers are traced: one executable serves every step count, scale, shift and seed
at a given number of tokens. The carry is donated. There are no callbacks inside, so that executables can be stored.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smartdiff_jax.cache.base import CachePolicy
from smartdiff_jax.models.family import Conditioning
from smartdiff_jax.samplers.base import MAX_STEPS, Sampler, Schedule
from smartdiff_jax.stages.base import Progress, jit_in
from smartdiff_jax.stages.guidance import Guidance

CHUNK_SECONDS = 0.5
MAX_CHUNK = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenoiseCarry:
    """What one step hands to the next.

    tokens: packed noisy latents, float32 [b, s, p].
    executed: bool [MAX_STEPS], at which steps the blocks were computed.
    """

    tokens: Float[Array, "b s p"]
    sampler_state: Any
    cache_state: Any
    executed: Bool[Array, " max_steps"]


@dataclasses.dataclass(frozen=True)
class Expert:
    """A set of denoiser weights and the steps [first, last) it is used for."""

    weights: Any
    first: int
    last: int


class DenoiseLoop:
    """The loop for one model structure, attention and guidance; jax keeps an executable per shape.

    graphdef: of the denoiser (nnx.split); its weights are arguments of every call.
    attend: attention, wrapped for the mesh.
    guidance: how the branches of classifier-free guidance run.
    dtype: the denoiser computes in; the latents and the sampler are float32 always.
    placement: sharding of the carry. Said once for all chunks, because an equal carry placed by another sharding object,
        as the first chunk's would be, is another executable.
    """

    def __init__(self, graphdef: Any, attend: Any, guidance: Guidance, dtype: Any, placement: Any):
        self._graphdef, self._attend, self._guidance = graphdef, attend, guidance
        self.start = jit_in(dtype, self._start, out_shardings=placement)
        self.run = jit_in(dtype, self._run, donate_argnames="carry", out_shardings=placement)

    def _evaluate(self, weights, conditioning, timestep, index, num_steps, policy):
        """One branch: tokens, its text and its cache memory to a velocity."""
        model: Any = nnx.merge(self._graphdef, weights)

        def evaluate(tokens, text, state):
            hidden, context = model.embed(tokens, timestep, dataclasses.replace(conditioning, text=text))

            def blocks(hidden):
                return model.run_blocks(hidden, context, self._attend, 0, model.num_blocks)

            out, state, computed = policy.run(state, index, num_steps, hidden, lambda: model.probe(hidden, context), blocks)
            return model.head(out, context), state, computed

        return evaluate

    def _start(
        self,
        weights: Any,
        tokens: Float[Array, "b s p"],
        conditioning: Conditioning,
        policy: CachePolicy,
        sampler: Sampler,
    ) -> DenoiseCarry:
        model: Any = nnx.merge(self._graphdef, weights)
        states = self._guidance.num_states
        width = 2 // states

        def like_hidden():
            text = conditioning.text[0]
            wide = dataclasses.replace(conditioning, text=jnp.tile(text, (width, 1, 1)))
            return policy.init(model.embed(jnp.tile(tokens, (width, 1, 1)), jnp.float32(0), wide)[0])

        memory = jax.eval_shape(like_hidden)
        return DenoiseCarry(
            tokens=tokens,
            sampler_state=sampler.init(tokens),
            cache_state=jax.tree.map(lambda leaf: jnp.zeros((states, *leaf.shape), leaf.dtype), memory),
            executed=jnp.zeros(MAX_STEPS, bool),
        )

    def _run(
        self,
        weights: Any,
        carry: DenoiseCarry,
        conditioning: Conditioning,
        schedule: Schedule,
        guidance_scale: Float[Array, " max_steps"],
        policy: CachePolicy,
        sampler: Sampler,
        lo: Int[Array, ""],
        hi: Int[Array, ""],
    ) -> DenoiseCarry:
        def body(index, carry: DenoiseCarry) -> DenoiseCarry:
            evaluate = self._evaluate(weights, conditioning, schedule.timesteps[index], index, schedule.num_steps, policy)
            with jax.named_scope("model"):
                velocity, cache_state, computed = self._guidance(
                    evaluate, carry.tokens, conditioning.text, guidance_scale[index], carry.cache_state
                )
            with jax.named_scope("sampler"):
                tokens, sampler_state = sampler.step(carry.sampler_state, carry.tokens, velocity, schedule, index)
            return DenoiseCarry(tokens, sampler_state, cache_state, carry.executed.at[index].set(computed))

        return jax.lax.fori_loop(lo, hi, body, carry)


def denoise(
    loop: DenoiseLoop,
    experts: list[Expert],
    tokens: Float[Array, "b s p"],
    conditioning: Conditioning,
    schedule: Schedule,
    guidance_scale: Float[np.ndarray, " max_steps"],
    policy: CachePolicy,
    sampler: Sampler,
    chunk: int | None = None,
) -> Iterator[Progress | DenoiseCarry]:
    """Drive the loop chunk by chunk; yields Progress after each, and at last the carry.

    conditioning.text is [2 b l d], positive branch first. `chunk` fixes the steps a chunk; None keeps chunks near half a
    second, so that progress and cancelling stay prompt whatever the model (bounds are traced: any length costs nothing).
    """
    num_steps = int(schedule.num_steps)
    carry = loop.start(experts[0].weights, tokens, conditioning, policy, sampler)
    length = chunk or 1
    for expert in experts:
        lo = expert.first
        while lo < expert.last:
            hi = min(lo + length, expert.last)
            began = time.perf_counter()
            carry = loop.run(
                expert.weights,
                carry,
                conditioning,
                schedule,
                guidance_scale,
                policy,
                sampler,
                np.int32(lo),
                np.int32(hi),
            )
            carry.tokens.block_until_ready()
            if chunk is None and lo > 0:
                per_step = (time.perf_counter() - began) / (hi - lo)
                length = min(max(1, int(CHUNK_SECONDS / per_step)), MAX_CHUNK)
            lo = hi
            yield Progress("denoise", lo, num_steps)
    yield carry


def split_experts(weights: list[Any], timesteps: np.ndarray, num_steps: int, boundary: float | None) -> list[Expert]:
    """Which steps each set of weights serves: the high-noise expert while timestep >= boundary * 1000 (Wan 2.2).

    weights: one denoiser, or [high noise, low noise].
    """
    if boundary is None or len(weights) == 1:
        return [Expert(weights[0], 0, num_steps)]
    switch = int(np.sum(timesteps[:num_steps] >= boundary * 1000))
    return [Expert(weights[0], 0, switch), Expert(weights[1], switch, num_steps)]
