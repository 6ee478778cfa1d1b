"""The pool: latents and captions of rendered scenes, kept on the device, from which training steps draw their batches.

Encoding a clip costs far more than training on its latents once, so a clip is used many times; the pool is filled by parts
and then refreshed by parts, oldest first, at a share of the time that the recipe sets. Steps draw from what is filled, so
training begins after the first part.
"""

import dataclasses
import random
import string
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smartdiff_jax.training.data.scenes import Scene
from smartdiff_jax.training.loop import Prefetch
from smartdiff_jax.training.worlds import World

STRANGE_SHARE = 0.06
"""Share of captions with a made-up word in them: a model that never saw one is thrown off by the first it meets."""

LONGEST_CALL = 5.0  # seconds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """tokens: packed, normalised latents; text: token ids of several captions of each clip."""

    tokens: Float[Array, "n s p"]
    text: Int[Array, "n v l"]

    @classmethod
    def empty(cls, size: int, tokens: tuple[int, int], variants: int, length: int) -> "Pool":
        """Room for `size` clips of [s, p] tokens."""
        return cls(jnp.zeros((size, *tokens), jnp.bfloat16), jnp.zeros((size, variants, length), jnp.int16))

    @property
    def size(self) -> int:
        return len(self.tokens)


def _put(pool: Pool, tokens: Array, text: Array, at: Array) -> Pool:
    return Pool(
        jax.lax.dynamic_update_slice(pool.tokens, tokens, (at, 0, 0)),
        jax.lax.dynamic_update_slice(pool.text, text.astype(pool.text.dtype), (at, 0, 0)),
    )


put = jax.jit(_put, donate_argnums=0)
"""Compiled: clips in place of those from row `at` on; takes the pool over."""


def scene_batches(world: World, calls: int, batch: int, rng: np.random.Generator) -> tuple[Any, Scene]:
    """What is shown, and scenes [calls, batch, ...]."""
    choice = world.captioner.choose(calls * batch, rng)
    scenes = world.stage(choice, rng)
    return choice, jax.tree.map(lambda a: a.reshape(calls, batch, *a.shape[1:]), scenes)


def part_maker(
    world: World,
    tokenize: Callable[[Sequence[str]], Int[np.ndarray, "n l"]],
    calls: int,
    batch: int,
    variants: int,
    seed: Sequence[int],
) -> Callable[[int], tuple[Scene, Int[np.ndarray, "n v l"]]]:
    """A function from the number of a part to its scenes [calls, batch, ...] and the token ids of their captions."""

    def make(index: int) -> tuple[Scene, Int[np.ndarray, "n v l"]]:
        rng = np.random.default_rng([*seed, index])
        choice, scenes = scene_batches(world, calls, batch, rng)
        dice = random.Random(int(rng.integers(2**62)))
        texts = [with_strange_words(world.captioner.captions(choice, rng), dice) for _ in range(variants)]
        return scenes, np.stack([tokenize(text) for text in texts], axis=1)

    return make


def with_strange_words(captions: Sequence[str], dice: random.Random) -> list[str]:
    """Some of the captions get one word of random letters somewhere; empty ones stay empty."""
    result = []
    for caption in captions:
        if caption and dice.random() < STRANGE_SHARE:
            words = caption.split(" ")
            strange = "".join(dice.choices(string.ascii_lowercase, k=dice.randint(3, 9)))
            words.insert(dice.randint(0, len(words)), strange)
            caption = " ".join(words)
        result.append(caption)
    return result


class Filler:
    """Fills the pool part by part, and then replaces its oldest part, at a share of the time.

    encode: scenes to packed, normalised latents on the device. parts: what `part_maker` makes. Each part must divide the pool.
    fill_share, refresh_share: of the time spent on encoding while the pool is filling, and once it is full.
    """

    def __init__(
        self,
        pool: Pool,
        encode: Callable[[Scene], Array],
        parts: Prefetch[tuple[Scene, Int[np.ndarray, "n v l"]]],
        fill_share: float,
        refresh_share: float,
    ):
        self.pool, self.filled, self.encoded = pool, 0, 0
        self._encode, self._parts = encode, parts
        self._shares = fill_share, refresh_share
        self._at, self._credit, self._last = 0, 0.0, time.monotonic()
        self.part_seconds = 0.0

    def add(self) -> None:
        """Encode one more part. Returns before the device has done it."""
        scenes, text = self._parts.take()
        tokens = self._encode(scenes)
        self.pool = put(self.pool, tokens, text, np.int32(self._at))
        self._at = (self._at + len(text)) % self.pool.size
        self.encoded += len(text)
        self.filled = min(self.pool.size, self.filled + len(text))

    def prefill(self, clips: int) -> None:
        """Encode until there are `clips`, and measure how long a part takes (the first, which compiles, does not count)."""
        self.add()
        self.pool.tokens.block_until_ready()
        began, parts = time.monotonic(), 0
        while parts == 0 or self.filled < min(clips, self.pool.size):
            self.add()
            self.pool.tokens.block_until_ready()
            parts += 1
        self._last = time.monotonic()
        self.part_seconds = (self._last - began) / parts

    def keep_up(self) -> None:
        """Encode as much as the time since the last call allows."""
        now = time.monotonic()
        share = self._shares[self.filled == self.pool.size]
        self._credit += share * min(now - self._last, LONGEST_CALL)  # compiling is no training
        self._last = now
        while self._credit >= self.part_seconds:
            self.add()
            self._credit -= self.part_seconds
