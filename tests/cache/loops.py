"""Policies driven two ways: over a toy stack of blocks, and through the real denoise loop on a golden's tiny transformer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden_weights import load_golden

from smartdiff_jax.cache.base import Stack, Step
from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.kernels.xla import xla_attention
from smartdiff_jax.models import flux1, wan
from smartdiff_jax.models.family import Conditioning
from smartdiff_jax.models.tokens import ChosenTokens
from smartdiff_jax.samplers.base import MAX_STEPS, Schedule
from smartdiff_jax.samplers.flow_euler import FlowEuler
from smartdiff_jax.sharding.context_parallel import wrap
from smartdiff_jax.sharding.layout import Layout
from smartdiff_jax.sharding.mesh import make_mesh
from smartdiff_jax.stages.denoise import DenoiseLoop, Expert, denoise
from smartdiff_jax.stages.guidance import GUIDANCE, combine_plain
from smartdiff_jax.weights.residency import Resident

MODELS = {"cache_wan": wan, "cache_flux1": flux1}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToyStack(Stack):
    """Block l adds parts[l] to the stream; what the decisions look at is given."""

    hidden: Any
    parts: Any
    time: Any

    @property
    def num_blocks(self):
        return self.parts.shape[0]

    def run(self, hidden, lo, hi):
        added = self.parts[lo:hi].sum(axis=0)
        return (hidden[0] + added, hidden[1] - added[:, :1]) if isinstance(hidden, tuple) else hidden + added

    def modules(self):
        return ({"self_attention": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.parts)},)

    def run_modules(self, around, held):
        """Each block's part is what its only module gives."""

        def block(hidden, own):
            part, held = own
            part = around("self_attention", held, lambda: part)
            hidden = (hidden[0] + part, hidden[1] - part[:, :1]) if isinstance(hidden, tuple) else hidden + part
            return hidden, part

        hidden, parts = jax.lax.scan(block, self.hidden, (self.parts, held[0]["self_attention"]))
        return hidden, ({"self_attention": parts},)

    def keys(self):
        return ({"k": self.parts, "v": self.parts},)

    def choose(self, priority, share):
        return ChosenTokens.of(priority, share, 1)

    def run_tokens(self, held, chosen=None):
        """Blocks that look at one token alone; the keys are what they add."""
        added = self.parts.sum(axis=0)
        if chosen is None:
            return self.run(self.hidden, 0, self.num_blocks), self.keys()
        rows, own = chosen.pick(self.hidden), chosen.pick(added)
        out = (rows[0] + own, rows[1] - added[:, :1]) if isinstance(rows, tuple) else rows + own
        keys = jax.vmap(lambda of_block, part: chosen.put(of_block, chosen.pick(part)))(held[0]["k"], self.parts)
        return out, ({"k": keys, "v": keys},)

    def modulated_input(self):
        return self.hidden[0] if isinstance(self.hidden, tuple) else self.hidden

    def time_embedding(self):
        return self.time


class Toy:
    """A policy over a whole run of toy stacks, as one compiled loop."""

    def __init__(self):
        self.traces = 0
        self._run = jax.jit(self._loop)

    def _loop(self, policy, stacks, num_steps, first, token_weights):
        self.traces += 1

        def at(index):
            return jax.tree.map(lambda leaf: leaf[index], stacks)

        memory = policy.init_stack(at(0))

        def body(index, carry):
            memory, outs, executed = carry
            changed = (index == first) & (first > 0)
            timestep = 1000.0 * (num_steps - index) / (num_steps + 1)
            step = Step(index, num_steps, jnp.zeros(MAX_STEPS + 1), timestep, changed, token_weights)
            out, memory, computed = policy.blocks(memory, step, at(index))
            outs = jax.tree.map(lambda leaf, new: leaf.at[index].set(new), outs, out)
            return memory, outs, executed.at[index].set(computed)

        carry = memory, jax.tree.map(jnp.zeros_like, stacks.hidden), jnp.zeros(MAX_STEPS)
        _, outs, executed = jax.lax.fori_loop(0, num_steps, body, carry)
        return outs, executed

    def __call__(self, policy, num_steps, stacks=None, first=0, token_weights=None):
        """What left the stack at each step, and the string of computed steps."""
        stacks = toy_stacks() if stacks is None else stacks
        outs, executed = self._run(policy, stacks, jnp.int32(num_steps), jnp.int32(first), token_weights)
        return outs, as_string(executed[:num_steps])


def toy_stacks(seed=0, *, pair=False, batch=1, num_blocks=12, drift=0.3):
    """MAX_STEPS random stacks [b 5 4]; `drift` is how much a step adds to everything."""
    rng = np.random.RandomState(seed)

    def walk(*shape):
        steps = rng.standard_normal((MAX_STEPS, *shape)) * drift
        steps[0] /= drift
        return jnp.asarray(np.cumsum(steps, axis=0), jnp.float32)

    hidden = walk(batch, 5, 4)
    return ToyStack((hidden, walk(batch, 3, 4)) if pair else hidden, walk(num_blocks, batch, 5, 4), walk(batch, 6, 4))


def as_string(executed):
    return "".join(".123F"[round(4 * float(share))] for share in np.asarray(executed))


@dataclasses.dataclass
class Tiny:
    """A golden's tiny transformer in the real loop."""

    arrays: dict
    loop: DenoiseLoop
    weights: Any
    tokens: Any
    branches: Conditioning
    patches: Any
    grid: tuple[int, int, int]

    @classmethod
    def load(cls, name, guidance="sequential", mesh=MeshConfig()):
        module = MODELS[name]
        arrays, config, model = load_golden(name, module.ARCHITECTURE)
        graphdef, weights = nnx.split(model)
        layout = Layout(make_mesh(mesh))
        attend = wrap(xla_attention, layout.mesh, batch=layout.batch_axes)
        loop = DenoiseLoop(graphdef, attend, GUIDANCE[guidance](layout.as_branches), combine_plain, jnp.float32, layout)
        patches = module.patches(config)
        latents = arrays["latents"]
        latents = jnp.asarray(latents if latents.ndim == 5 else latents[:, :, None])
        grid = patches.grid(latents.shape)
        text = jnp.asarray(arrays["text"])
        rope, _ = module.rope(config, grid, text.shape[2], text.shape[2])
        branches = Conditioning(
            text=text,
            rope=layout.place_rope(tuple(np.repeat(table[None, None], text.shape[0], axis=0) for table in rope)),
            pooled=jnp.asarray(arrays["pooled"]) if "pooled" in arrays else None,
        )
        tokens = layout.pad_tokens(patches.pack(latents))
        return cls(arrays, loop, weights, jax.device_put(tokens, layout.tokens), branches, patches, grid)

    @property
    def num_tokens(self):
        count = int(np.prod(self.grid))
        return None if count == self.tokens.shape[1] else count

    def schedule(self, sigmas=None):
        sigmas = np.asarray(self.arrays["sigmas"] if sigmas is None else sigmas, np.float32)
        table = np.zeros(MAX_STEPS + 1, np.float32)
        table[: len(sigmas)] = sigmas
        return Schedule(jnp.asarray(table), jnp.asarray(1000 * table[:-1]), jnp.int32(len(sigmas) - 1))

    def __call__(self, policy, *, switch=None, scale=None, sigmas=None, weights=None):
        """The tokens at the end, and each branch's string of computed steps."""
        schedule = self.schedule(sigmas)
        steps = int(schedule.num_steps)
        weights = Resident(self.weights if weights is None else weights)
        experts = [Expert(weights, 0, steps)]
        if switch is not None:
            experts = [Expert(weights, 0, switch), Expert(weights, switch, steps)]
        scale = self.arrays["scale"] if scale is None else scale
        scales = np.full(MAX_STEPS, scale, np.float32)
        run = denoise(
            self.loop, experts, self.tokens, self.branches, schedule, scales, policy, FlowEuler(), self.num_tokens, chunk=steps
        )
        *_, carry = run
        executed = np.asarray(carry.executed)[:steps]
        return np.asarray(carry.tokens)[:, : int(np.prod(self.grid))], [as_string(column) for column in executed.T]
