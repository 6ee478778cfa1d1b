"""Latents from the weights in training, through the product's own denoise loop, and contact sheets of what they decode to."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image, ImageDraw

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.config.model import SamplingDefaults
from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.models.families import Family
from smartdiff_jax.models.family import Conditioning
from smartdiff_jax.samplers import SAMPLERS
from smartdiff_jax.samplers.base import MAX_STEPS, Spacing
from smartdiff_jax.sharding.layout import Layout
from smartdiff_jax.sharding.mesh import make_mesh
from smartdiff_jax.stages.denoise import DenoiseLoop
from smartdiff_jax.stages.guidance import GUIDANCE, combine_for
from smartdiff_jax.training.flow_matching import attend_with, part_of, told
from smartdiff_jax.training.state import Component, Params
from smartdiff_jax.training.trainees.base import TEXT_ENCODER, TRANSFORMER

MARGIN, LABEL, LETTER = 4, 14, 6  # pixels around a picture, to a line of its label, to a letter


class Generator:
    """Prompts to latents, many at once; one executable for every batch of prompts of the same size."""

    def __init__(
        self,
        family: Family,
        transformer: Component,
        text_encoder: Component,
        latent_shape: tuple[int, int, int, int],
        text_length: int,
        sampling: SamplingDefaults,
        attention: str,
    ):
        """text_length: tokens of a text, its template's included. sampling: as the model will be served."""
        self._sampling, source = sampling, family.text[0]
        patches = family.patches(transformer.config)
        grid = patches.grid((1, *latent_shape))
        ropes = family.rope(transformer.config, grid, text_length - source.skip, 0)
        self._ropes = jax.tree.map(lambda table: jnp.broadcast_to(table, (2, 1, *table.shape)), ropes)
        attend, layout = attend_with(attention), Layout(make_mesh(MeshConfig()))
        guidance = GUIDANCE["sequential"](layout.as_branches)
        combine = combine_for(sampling)
        self._loop = DenoiseLoop(transformer.graphdef, attend, guidance, combine, transformer.dtype, layout)
        self._encode = jax.jit(lambda params, ids: told(source, text_encoder.module(params), ids))
        self._weights = jax.jit(transformer.weights)
        self._unpack = jax.jit(lambda tokens: patches.unpack(tokens, grid))

        def noise(seed: Array, n: int) -> Array:
            return patches.pack(jax.random.normal(jax.random.key(seed), (n, *latent_shape)))

        self._noise = jax.jit(noise, static_argnums=1)

    def __call__(
        self,
        params: Params,
        ids: Int[np.ndarray, "n l"],
        empty: Int[np.ndarray, "1 l"],
        seed: int,
        num_steps: int,
    ) -> Float[Array, "n c f h w"]:
        """ids: of the prompts; empty: of the empty prompt, for guidance. params: of transformer and text encoder."""
        n, sampling = len(ids), self._sampling
        encoded = self._encode(part_of(params, TEXT_ENCODER), np.concatenate([ids, np.repeat(empty, n, axis=0)]))
        text, length = jax.tree.map(lambda leaf: leaf.reshape(2, n, *leaf.shape[1:]), encoded)
        conditioning = Conditioning(text, self._ropes[0], self._ropes[1], length)
        solver, policy = SAMPLERS[sampling.sampler], POLICIES["none"]()
        weights = self._weights(part_of(params, TRANSFORMER))
        tokens = self._noise(np.uint32(seed), n)
        start, run = self._loop.functions(weights, tokens, conditioning, policy, solver)
        carry = start(weights, tokens, conditioning, policy, solver)
        schedule = solver.schedule(num_steps, sampling.shift, Spacing(sampling.from_one, sampling.terminal))
        scale = np.full(MAX_STEPS, sampling.guidance_scale, np.float32)
        lo, hi = np.int32(0), np.int32(num_steps)
        carry = run(weights, carry, conditioning, schedule, scale, policy, solver, lo, hi, lo)
        return self._unpack(carry.tokens)


def sheet(clips: UInt8[np.ndarray, "n f h w 3"], labels: Sequence[str], file: Path, frames: int = 4) -> None:
    """A picture of `frames` frames of every clip in a row of its own with its label; two rows side by side, of stills four."""
    n, total, height, width, _ = clips.shape
    columns = 4 if total == 1 else 2
    wanted = np.linspace(0, total - 1, min(frames, total)).round().astype(int)
    across = len(wanted) * (width + MARGIN) + 2 * MARGIN
    written = [textwrap.wrap(label, across // LETTER) or [""] for label in labels]
    above = LABEL * max(map(len, written), default=1)
    cell = across, height + above + MARGIN
    rows = -(-n // columns)
    canvas = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (clip, lines) in enumerate(zip(clips, written, strict=True)):
        left, top = (index % columns) * cell[0] + MARGIN, (index // columns) * cell[1]
        for number, line in enumerate(lines):
            draw.text((left, top + 1 + number * LABEL), line, fill="black")
        for column, frame in enumerate(wanted):
            canvas.paste(Image.fromarray(clip[frame]), (left + column * (width + MARGIN), top + above))
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(file)
