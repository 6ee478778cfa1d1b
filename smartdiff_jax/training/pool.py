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
from smartdiff_jax.training.devices import BY_COLUMN, BY_ROW, EVERYWHERE, Devices
from smartdiff_jax.training.loop import Prefetch
from smartdiff_jax.training.worlds import World

NOISY_SHARE = 0.25
"""Share of captions that are roughened: a model that only saw sound ones is thrown off by the first word it does not know."""

GLUE = frozenset("a an the on of in to with is it that as style background backdrop picture".split())
"""Words that a sentence can be understood without."""

LONGEST_CALL = 5.0  # seconds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """tokens: packed, normalised latents; text: token ids of several captions of each clip. Split over the devices by clips."""

    tokens: Float[Array, "n s p"]
    text: Int[Array, "n v l"]

    @classmethod
    def empty(cls, size: int, tokens: tuple[int, int], variants: int, length: int, devices: Devices) -> "Pool":
        """Room for `size` clips of [s, p] tokens."""
        rows = devices.sharding(BY_ROW)
        return cls(
            jnp.zeros((size, *tokens), jnp.bfloat16, device=rows),
            jnp.zeros((size, variants, length), jnp.int16, device=rows),
        )

    @property
    def size(self) -> int:
        return len(self.tokens)


def putter(devices: Devices) -> Callable[[Pool, Any, Any, Any], Pool]:
    """A compiled function: (pool, tokens [k, b, s, p], text [k, b, v, l], row) to the pool with these clips in each device's
    part from that row of it on; it takes the pool over."""

    def put(pool: Pool, tokens: Array, text: Array, at: Array) -> Pool:
        tokens, text = (part.reshape(-1, *part.shape[2:]) for part in (tokens, text.astype(pool.text.dtype)))
        return Pool(
            jax.lax.dynamic_update_slice(pool.tokens, tokens, (at, 0, 0)),
            jax.lax.dynamic_update_slice(pool.text, text, (at, 0, 0)),
        )

    split = devices.each(put, (BY_ROW, BY_COLUMN, BY_COLUMN, EVERYWHERE), BY_ROW)
    return jax.jit(split, donate_argnums=0)


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
) -> Callable[[int], tuple[Scene, Int[np.ndarray, "k b v l"]]]:
    """A function from the number of a part to its scenes [calls, batch, ...] and the token ids of their captions."""

    def make(index: int) -> tuple[Scene, Int[np.ndarray, "k b v l"]]:
        rng = np.random.default_rng([*seed, index])
        choice, scenes = scene_batches(world, calls, batch, rng)
        dice = random.Random(int(rng.integers(2**62)))
        texts = [roughened(world.captioner.captions(choice, rng), dice) for _ in range(variants)]
        ids = np.stack([tokenize(text) for text in texts], axis=1)
        return scenes, ids.reshape(calls, batch, *ids.shape[1:])

    return make


def roughened(captions: Sequence[str], dice: random.Random) -> list[str]:
    """Some of the captions lose some of their glue, or get made-up words in its place or anywhere; empty ones stay empty."""
    result = []
    for caption in captions:
        if caption and dice.random() < NOISY_SHARE:
            words = []
            for word in caption.split(" "):
                spared = word not in GLUE or dice.random() < 0.7
                if spared or dice.random() < 0.5:
                    words.append(word if spared else _strange(dice, caption))
            for _ in range(dice.choice((0, 1, 2))):
                words.insert(dice.randint(0, len(words)), _strange(dice, caption))
            caption = " ".join(words)
        result.append(caption)
    return result


def _strange(dice: random.Random, caption: str) -> str:
    """A made-up word; half of them begin as a word of the caption does, as words that the tokenizer cuts often do."""
    begin = dice.choice(caption.split(" "))[: dice.randint(2, 5)] if dice.random() < 0.5 else ""
    return begin + "".join(dice.choices(string.ascii_lowercase, k=dice.randint(2, 7)))


class Filler:
    """Fills the pool part by part, and then replaces its oldest part, at a share of the time.

    encode: scenes to packed, normalised latents [k, b, s, p] on the devices. parts: what `part_maker` makes. Each part must
    divide the pool. `filled` counts clips of all devices.
    fill_share, refresh_share: of the time spent on encoding while the pool is filling, and once it is full.
    """

    def __init__(
        self,
        pool: Pool,
        encode: Callable[[Scene], Array],
        parts: Prefetch[tuple[Scene, Int[np.ndarray, "k b v l"]]],
        fill_share: float,
        refresh_share: float,
        devices: Devices,
    ):
        self.pool, self.filled, self.encoded = pool, 0, 0
        self._put, self._devices = putter(devices), devices.count
        self._encode, self._parts = encode, parts
        self._shares = fill_share, refresh_share
        self._at, self._credit, self._last = 0, 0.0, time.monotonic()
        self.part_seconds = 0.0

    def add(self) -> None:
        """Encode one more part. Returns before the device has done it."""
        scenes, text = self._parts.take()
        tokens = self._encode(scenes)
        self.pool = self._put(self.pool, tokens, text, np.int32(self._at // self._devices))
        clips = text.shape[0] * text.shape[1]
        self._at = (self._at + clips) % self.pool.size
        self.encoded += clips
        self.filled = min(self.pool.size, self.filled + clips)

    @property
    def filled_each(self) -> int:
        """Clips in each device's part."""
        return self.filled // self._devices

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
