"""THE loop: where model, parallelism, kernel, cache policy and sampler meet, and nowhere else.

    host:    for chunk [lo, hi):  carry = run(weights, carry, tables, lo, hi)    progress, cancel, another job's turn
    device:  fori_loop(lo, hi):   velocity = guide(model); latents = sampler.step(latents, velocity)

Bounds, tables, guidance and the policy's numbers are traced: one executable serves every step count, scale, shift and seed
at a given number of tokens. The carry is donated. There are no callbacks inside, so that executables can be stored.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from smartdiff_jax.cache.base import CachePolicy, Step
from smartdiff_jax.kernels.base import Attend, PaddedAttend
from smartdiff_jax.models.family import Conditioning
from smartdiff_jax.models.modules import HeldModules, HeldRemotes, module_shapes, remote_shapes
from smartdiff_jax.models.tokens import ChosenTokens, HeldKeys, key_shapes
from smartdiff_jax.samplers.base import MAX_STEPS, Sampler, Schedule
from smartdiff_jax.sharding.layout import Layout
from smartdiff_jax.stages.base import Progress, jit_in
from smartdiff_jax.stages.cache_memory import check_fits
from smartdiff_jax.stages.checkpoint import Checkpoint, restore
from smartdiff_jax.stages.guidance import Combine, Guidance, as_batch
from smartdiff_jax.weights.residency import Held

CHUNK_SECONDS = 0.5
MAX_CHUNK = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenoiseCarry:
    """What one step hands to the next.

    tokens: packed noisy latents, float32 [b, s, p].
    executed: float32 [MAX_STEPS, n], for which share of the tokens the blocks of which branch were computed at which step.
    """

    tokens: Float[Array, "b s p"]
    sampler_state: Any
    cache_state: Any
    executed: Float[Array, "max_steps n"]


@dataclasses.dataclass(frozen=True)
class ChunkDone(Progress):
    """Progress of the loop. The carry lives until the next chunk, which is given its memory.

    estimate: the clean tokens as far as they can be told, where the chunk ended at a stop that was asked for: the end of
        the straight line through the chunk's two ends.
    """

    carry: DenoiseCarry
    estimate: Float[Array, "b s p"] | None


@dataclasses.dataclass(frozen=True)
class Expert:
    """A set of denoiser weights and the steps [first, last) it is used for."""

    weights: Held
    first: int
    last: int


class DenoiseLoop:
    """The loop for one model structure, attention and guidance; jax keeps an executable per shape.

    graphdef: of the denoiser (nnx.split); its weights are arguments of every call.
    attend: attention, wrapped for the mesh.
    guidance, combine: how the branches of classifier-free guidance run, and how they are put together.
    dtype: the denoiser computes in; the latents and the sampler are float32 always.
    layout: where the carry lies. Its placements are said once for all chunks, because an equal carry placed by another
        sharding object, as the first chunk's would be, is another executable.
    """

    def __init__(self, graphdef: Any, attend: PaddedAttend, guidance: Guidance, combine: Combine, dtype: Any, layout: Layout):
        self._graphdef, self._attend, self._guidance, self._combine = graphdef, attend, guidance, combine
        self._dtype, self._layout = dtype, layout
        self._compiled: dict[Any, tuple[Callable[..., DenoiseCarry], Callable[..., DenoiseCarry]]] = {}

    def functions(
        self, weights: Any, tokens: Array, branches: Conditioning, policy: CachePolicy, sampler: Sampler
    ) -> tuple[Callable[..., DenoiseCarry], Callable[..., DenoiseCarry]]:
        """`_start` and `_run` (donates the carry), compiled for inputs like these."""
        arguments = weights, tokens, branches, policy, sampler
        leaves, structure = jax.tree.flatten(arguments[1:])
        key = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in self._compiled:
            self._compiled[key] = self._compile(arguments)
        return self._compiled[key]

    def _compile(self, arguments: tuple[Any, ...]) -> tuple[Callable[..., DenoiseCarry], Callable[..., DenoiseCarry]]:
        # The carry crosses the border as a list of arrays: only those have placements.
        def start(*arguments):
            leaves, structure = jax.tree.flatten(self._start(*arguments))
            structures[:] = [structure]
            return leaves

        def run(weights, leaves, *rest):
            return jax.tree.leaves(self._run(weights, jax.tree.unflatten(structures[0], leaves), *rest))

        structures: list[Any] = []
        shapes = jax.eval_shape(start, *arguments)
        placements = self._layout.carry(shapes, arguments[1].shape[1])
        check_fits(arguments[3], shapes, placements, self._layout.mesh)
        jit_start = jit_in(self._dtype, start, out_shardings=placements)
        jit_run = jit_in(self._dtype, run, donate_argnums=1, out_shardings=placements)
        return (
            lambda *arguments: jax.tree.unflatten(structures[0], jit_start(*arguments)),
            lambda weights, carry, *rest: jax.tree.unflatten(structures[0], jit_run(weights, jax.tree.leaves(carry), *rest)),
        )

    def _start(
        self,
        weights: Any,
        tokens: Float[Array, "b s p"],
        branches: Conditioning,
        policy: CachePolicy,
        sampler: Sampler,
    ) -> DenoiseCarry:
        model: Any = nnx.merge(self._graphdef, weights)
        num_branches = branches.text.shape[0]
        states = self._guidance.num_states(num_branches)
        width = num_branches // states

        def like_blocks():
            one = as_batch(jax.tree.map(lambda leaf: leaf[:width], branches), tokens.shape[0])
            hidden, context = model.embed(jnp.tile(tokens, (width, 1, 1)), jnp.float32(0), one)
            stack: Any = _Stack(model, self._attend, hidden, context, self._layout.shards)
            return policy.init_stack(stack)

        of_blocks, of_step = jax.eval_shape(like_blocks), jax.eval_shape(policy.init_step, tokens)
        return DenoiseCarry(
            tokens=tokens,
            sampler_state=sampler.init(tokens),
            cache_state=(
                jax.tree.map(lambda leaf: jnp.zeros((states, *leaf.shape), leaf.dtype), of_blocks),
                jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), of_step),
            ),
            executed=jnp.zeros((MAX_STEPS, num_branches)),
        )

    def _run(
        self,
        weights: Any,
        carry: DenoiseCarry,
        branches: Conditioning,
        schedule: Schedule,
        guidance_scale: Float[Array, " max_steps"],
        policy: CachePolicy,
        sampler: Sampler,
        lo: Int[Array, ""],
        hi: Int[Array, ""],
        first: Int[Array, ""],
        num_tokens: Int[Array, ""] | None = None,
        sparsity: Float[Array, ""] | None = None,
    ) -> DenoiseCarry:
        """Steps lo to hi - 1; `first` is the step from which on these weights serve.

        num_tokens: how many tokens count, where they were padded for the mesh.
        sparsity: the share of the keys that attention leaves out, where it can.
        """
        model: Any = nnx.merge(self._graphdef, weights)
        attend: Any = self._attend
        counts = None
        if sparsity is not None:
            attend = attend.leaving_out(sparsity)
        if num_tokens is not None:
            attend = attend.for_length(num_tokens)
            counts = (jnp.arange(carry.tokens.shape[1]) < num_tokens).astype(jnp.float32)

        def body(index, carry: DenoiseCarry) -> DenoiseCarry:
            changed = (index == first) & (first > 0)
            step = Step(index, schedule.num_steps, schedule.sigmas, schedule.timesteps[index], changed, counts)

            def branch(tokens, conditioning, state):
                hidden, context = model.embed(tokens, step.timestep, conditioning)
                stack: Any = _Stack(model, attend, hidden, context, self._layout.shards)
                out, state, computed = policy.blocks(state, step, stack)
                return model.head(out, context), state, computed

            def evaluate(state, /, stand_in=None):
                scale = guidance_scale[index]
                with jax.named_scope("model"):
                    return self._guidance(branch, self._combine, carry.tokens, branches, scale, state, stand_in)

            inner, outer = carry.cache_state
            num_branches = branches.text.shape[0]
            velocity, outer, inner, computed = policy.step(outer, inner, step, carry.tokens, evaluate, num_branches)
            with jax.named_scope("sampler"):
                tokens, sampler_state = sampler.step(carry.sampler_state, carry.tokens, velocity, schedule, index)
            return DenoiseCarry(tokens, sampler_state, (inner, outer), carry.executed.at[index].set(computed))

        with jax.named_scope("denoise"):
            return jax.lax.fori_loop(lo, hi, body, carry)


@dataclasses.dataclass(frozen=True)
class _Stack:
    """cache.base.Stack of one evaluation. shards: how many devices the tokens are split over."""

    model: Any
    attend: Attend
    hidden: Any
    context: Any
    shards: int

    @property
    def num_blocks(self) -> int:
        return self.model.num_blocks

    def run(self, hidden, lo, hi):
        return self.model.run_blocks(hidden, self.context, self.attend, lo, hi)

    def modules(self):
        return module_shapes(self._run_all, self.attend)

    def run_modules(self, around, held):
        attend = HeldModules(self.attend, around, held)
        return self._run_all(attend), attend.after

    def remotes(self):
        return remote_shapes(self._run_all, self.attend)

    def run_remotes(self, held):
        attend = HeldRemotes(self.attend, held)
        return self._run_all(attend), attend.after

    def keys(self):
        return key_shapes(self._run_all, self.attend)

    def choose(self, priority, share):
        return ChosenTokens.of(priority, share, self.shards)

    def run_tokens(self, held, chosen=None):
        attend = HeldKeys(self.attend, held, chosen)
        if chosen is None:
            return self._run_all(attend), attend.after
        hidden = chosen.pick(self.hidden)
        context = dataclasses.replace(self.context, rope=tuple(chosen.pick(table) for table in self.context.rope))
        return self.model.run_blocks(hidden, context, attend, 0, self.num_blocks), attend.after

    def _run_all(self, attend):
        return self.model.run_blocks(self.hidden, self.context, attend, 0, self.num_blocks)

    def modulated_input(self):
        return self.model.probe(self.hidden, self.context)

    def time_embedding(self):
        return self.model.time_embedding(self.context)


def steps_of_chunk(seconds: float) -> int:
    """Steps of so many seconds each that are run before anybody looks."""
    return min(max(1, int(CHUNK_SECONDS / seconds)), MAX_CHUNK)


def denoise(
    loop: DenoiseLoop,
    experts: list[Expert],
    tokens: Float[Array, "b s p"],
    branches: Conditioning,
    schedule: Schedule,
    guidance_scale: Float[np.ndarray, " max_steps"],
    policy: CachePolicy,
    sampler: Sampler,
    num_tokens: int | None = None,
    chunk: int | None = None,
    resume: Checkpoint | None = None,
    stops: Collection[int] = (),
    sparsity: float | None = None,
) -> Iterator[ChunkDone | DenoiseCarry]:
    """Drive the loop chunk by chunk; yields ChunkDone when all is compiled and after each chunk, and at last the carry.

    num_tokens: how many tokens count, where they were padded for the mesh.
    branches: leaves [n ...], positive first, n = 2 with classifier-free guidance and 1 without. `chunk`
    fixes the steps a chunk; None keeps chunks near half a second, so that progress and cancelling stay prompt whatever the
    model (bounds are traced: any length costs nothing).
    resume: take up the loop where this was made; raises CheckpointError where it does not fit.
    stops: steps after which a chunk ends and tells its estimate.
    sparsity: the share of the keys that attention leaves out; None where it is wrapped for none.
    """
    num_steps = int(schedule.num_steps)
    counts = None if num_tokens is None else np.int32(num_tokens)
    share = None if sparsity is None else np.float32(sparsity)

    def run(weights: Any, carry: DenoiseCarry, lo: int, hi: int, first: int) -> DenoiseCarry:
        bounds = np.int32(lo), np.int32(hi), np.int32(first)
        return compiled(weights, carry, branches, schedule, guidance_scale, policy, sampler, *bounds, counts, share)

    with experts[0].weights.use() as weights:
        start, compiled = loop.functions(weights, tokens, branches, policy, sampler)
        carry = start(weights, tokens, branches, policy, sampler)
        carry = run(weights, carry, 0, 0, 0)  # no step: compiled before a device is waited for
        carry.tokens.block_until_ready()
    length, done, sigmas = chunk or 1, 0, np.asarray(schedule.sigmas)
    if resume is not None and resume.step > 0:
        carry, done = restore(resume.carry, carry), resume.step
    yield ChunkDone("denoise", done, num_steps, carry, None)
    for expert in experts:
        lo = max(expert.first, done)
        while lo < expert.last:
            hi = min(lo + length, expert.last, *(stop for stop in stops if stop > lo))
            before = jnp.copy(carry.tokens) if hi in stops else None
            began = time.perf_counter()
            with expert.weights.use() as weights:
                carry = run(weights, carry, lo, hi, expert.first)
                carry.tokens.block_until_ready()
            if chunk is None:
                length = steps_of_chunk((time.perf_counter() - began) / (hi - lo))
            estimate = None if before is None else clean(before, carry.tokens, sigmas[lo], sigmas[hi])
            lo = hi
            yield ChunkDone("denoise", lo, num_steps, carry, estimate)
    yield carry


@jax.jit
def clean(
    before: Float[Array, "b s p"], after: Float[Array, "b s p"], sigma_before: Any, sigma_after: Any
) -> Float[Array, "b s p"]:
    """Tokens at sigma 0 on the straight line through those at two noise levels, which a flow follows nearly."""
    return after - sigma_after * (after - before) / (sigma_after - sigma_before)


def split_experts(weights: list[Held], timesteps: np.ndarray, num_steps: int, boundary: float | None) -> list[Expert]:
    """Which steps each set of weights serves: the high-noise expert while timestep >= boundary * 1000 (Wan 2.2).

    weights: one denoiser, or [high noise, low noise].
    """
    if boundary is None or len(weights) == 1:
        return [Expert(weights[0], 0, num_steps)]
    switch = int(np.sum(timesteps[:num_steps] >= boundary * 1000))
    return [Expert(weights[0], 0, switch), Expert(weights[1], switch, num_steps)]
