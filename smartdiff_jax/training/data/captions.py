"""Chooses what moving scenes show, and captions them: subject, style, object colour, background and motion.

The pairs (subject, background), (subject, colour) and (subject, motion) in `held_out.json` are never chosen for training; they
and the held-out wordings measure generalisation (a fourth kind, subject and relation, belongs to `pictures`). Choices that
nobody could check by eye are avoided too: a sprite on a background of its own colour, a spinning ball without marks, a second
colour word on a "green apple".

Everything is deterministic in the NumPy generator given.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from jaxtyping import Bool, Float, Int

from smartdiff_jax.training.data.atlas import STYLES, Atlas
from smartdiff_jax.training.data.wording import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    MOTIONS,
    PROCEDURAL,
    RELATIONS,
    TRAINING,
    Attributes,
    sentence,
    vocabulary,
)

GROUND_RGB = np.array(list(BACKGROUNDS.values()), np.float32)
COLOUR_RGB = np.array(list(COLOURS.values()), np.float32)
GROUND_NAMES, COLOUR_NAMES = tuple(BACKGROUNDS), tuple(COLOURS)
STILL, ANIMATED = MOTIONS.index("still"), MOTIONS.index("animated")
TURNING = tuple(PROCEDURAL.index(name) for name in ("clockwise", "counterclockwise", "swing"))
COLOUR_WORDS = frozenset({*BACKGROUNDS, "golden", "gold", "silver", "bronze", "rainbow"})


@dataclass(frozen=True)
class Mix:
    """Shares of the training set. The three kinds of motion, and the styles, each sum to 1."""

    procedural: float = 0.55
    animated: float = 0.30
    still: float = 0.15
    styles: tuple[float, float, float] = (0.6, 0.2, 0.2)
    coloured: float = 0.2
    gradient: float = 0.25
    empty: float = 0.1


@dataclass(frozen=True)
class Choice:
    """What `n` scenes show, as indices: `colour` -1 is the sprite's own, `ground` is (top, bottom)."""

    subject: Int[np.ndarray, " n"]
    style: Int[np.ndarray, " n"]
    colour: Int[np.ndarray, " n"]
    ground: Int[np.ndarray, "n 2"]
    motion: Int[np.ndarray, " n"]


def held_out_pairs() -> Mapping[str, Mapping[str, str]]:
    """The committed list: for "background", "colour", "motion" and "relation" (to another, of pictures), the word each listed
    subject never has in training."""
    return json.loads(resources.files("smartdiff_jax.training.data").joinpath("held_out.json").read_text())


def draw_held_out(names: Sequence[str], seed: int = 2026) -> dict[str, dict[str, str]]:
    """How `held_out.json` was drawn, once: 5 % of all pairs of each kind, at most one a subject."""
    rng = np.random.default_rng(seed)
    drawn = {}
    kinds = (("background", GROUND_NAMES), ("colour", COLOUR_NAMES), ("motion", PROCEDURAL), ("relation", RELATIONS))
    for kind, words in kinds:
        chosen = rng.choice(len(names), round(0.05 * len(words) * len(names)), replace=False)
        drawn[kind] = {names[i]: words[rng.integers(len(words))] for i in sorted(chosen)}
    return drawn


def held(atlas: Atlas, pairs: Mapping[str, str], words: Sequence[str]) -> Bool[np.ndarray, "subjects words"]:
    table = np.zeros((len(atlas.names), len(words)), bool)
    for row, name in enumerate(atlas.names):
        if name in pairs:
            table[row, words.index(pairs[name])] = True
    return table


def _small(atlas: Atlas) -> Float[np.ndarray, "sprites h w 4"]:
    count, side = atlas.sprites.shape[:2]
    return atlas.sprites.reshape(count, side // 3, 3, side // 3, 3, 4).mean((2, 4), dtype=np.float32) / 255


def visible_on(small: Float[np.ndarray, "sprites h w 4"]) -> Bool[np.ndarray, "sprites grounds"]:
    """Whether at least 70 % of what a sprite covers differs from a background colour by more than 0.25."""
    alpha = small[..., 3]
    colour = small[..., :3] / np.maximum(alpha, 1e-3)[..., None]
    seen = [(alpha * (np.linalg.norm(colour - rgb, axis=-1) > 0.25)).sum((1, 2)) for rgb in GROUND_RGB]
    return np.stack(seen, -1) > 0.7 * alpha.sum((1, 2))[:, None]


def turnable(small: Float[np.ndarray, "sprites h w 4"]) -> Bool[np.ndarray, " sprites"]:
    """Whether a turn by 20 degrees can be seen: it changes the sprite by more than 8 % of full scale over its area."""
    side = small.shape[1]
    grid = np.arange(side) - (side - 1) / 2
    y, x = np.meshgrid(grid, grid, indexing="ij")
    c, s = np.cos(np.radians(20)), np.sin(np.radians(20))
    ty = np.clip(np.rint(c * y - s * x + (side - 1) / 2), 0, side - 1).astype(int)
    tx = np.clip(np.rint(s * y + c * x + (side - 1) / 2), 0, side - 1).astype(int)
    change = np.abs(small[:, ty, tx] - small).mean(-1).sum((1, 2))
    return change > 0.08 * small[..., 3].sum((1, 2))


class Rules:
    """What one atlas can show together: no pair that is held out, nothing that could not be seen. Takes a second or two."""

    def __init__(self, atlas: Atlas, held_out: Mapping[str, Mapping[str, str]] | None = None):
        self.atlas = atlas
        pairs = held_out_pairs() if held_out is None else held_out
        self.held_ground = held(atlas, pairs.get("background", {}), GROUND_NAMES)
        self.held_colour = held(atlas, pairs.get("colour", {}), COLOUR_NAMES)
        self.held_motion = held(atlas, pairs.get("motion", {}), PROCEDURAL)
        self.held_relation = held(atlas, pairs.get("relation", {}), RELATIONS)
        small = _small(atlas)
        self.visible, self.turnable = visible_on(small), turnable(small)
        self.colourable = np.array([COLOUR_WORDS.isdisjoint(name.split()) for name in atlas.names])
        far = np.linalg.norm(COLOUR_RGB[:, None] - GROUND_RGB[None], axis=-1)
        self.colour_visible = far > 0.45

    def grounds(
        self,
        sprite: Int[np.ndarray, " n"],
        subject: Int[np.ndarray, " n"],
        colour: Int[np.ndarray, " n"],
        keep_out: bool = True,
    ) -> Bool[np.ndarray, "n grounds"]:
        """The backgrounds that each sprite can be seen on and, with `keep_out`, is not held out on."""
        seen = np.where((colour < 0)[:, None], self.visible[sprite], self.colour_visible[colour])
        if keep_out:
            seen = seen & ~self.held_ground[subject]
        # A sprite of many colours may be hard to see on every background: then any will do.
        return np.where(seen.sum(-1, keepdims=True) < 2, ~self.held_ground[subject], seen)

    def paint(self, subject: Int[np.ndarray, " n"], share: float, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """A colour for some of those that can have one, -1 for the others."""
        chosen = self.colourable[subject] & (rng.random(len(subject)) < share)
        return np.where(chosen, draw(~self.held_colour[subject], rng), -1)


class Captioner:
    """Draws choices and captions for one atlas; drawing is vectorised."""

    def __init__(self, atlas: Atlas, mix: Mix = Mix(), held_out: Mapping[str, Mapping[str, str]] | None = None):
        self.atlas, self.mix, self.rules = atlas, mix, Rules(atlas, held_out)

    def allowed(
        self, choice: Choice, keep_out: bool = True
    ) -> tuple[Bool[np.ndarray, "n grounds"], Bool[np.ndarray, "n motions"]]:
        """The backgrounds and procedural motions that each chosen subject, style and colour can have."""
        sprite = self.atlas.sprite_index[choice.subject, choice.style]
        motion = np.ones((len(sprite), len(PROCEDURAL)), bool)
        motion[:, TURNING] = self.rules.turnable[sprite][:, None]
        if keep_out:
            motion = motion & ~self.rules.held_motion[choice.subject]
        return self.rules.grounds(sprite, choice.subject, choice.colour, keep_out), motion

    def choose(self, n: int, rng: np.random.Generator) -> Choice:
        """`n` training scenes in the shares of `mix`, without held-out pairs."""
        atlas, mix = self.atlas, self.mix
        kind = rng.choice(3, n, p=(mix.procedural, mix.animated, mix.still))
        with_clip = np.flatnonzero(atlas.animated)
        if len(with_clip) == 0:
            with_clip, kind = np.zeros(1, int), np.where(kind == 1, 2, kind)
        subject = np.where(kind == 1, rng.choice(with_clip, n), rng.integers(len(atlas.names), size=n))
        style = np.where(kind == 1, 0, rng.choice(len(STYLES), n, p=mix.styles))
        style = np.where(atlas.sprite_index[subject, style] < 0, 0, style)
        paint = (kind != 1) & self.rules.colourable[subject] & (rng.random(n) < mix.coloured)
        colour = np.where(paint, draw(~self.rules.held_colour[subject], rng), -1)
        choice = Choice(subject, style, colour, np.zeros((n, 2), int), kind)
        ground, motion = self.allowed(choice)
        top = draw(ground, rng)
        other = ground & (np.arange(len(GROUND_NAMES)) != top[:, None])
        bottom = np.where(rng.random(n) < mix.gradient, draw(other, rng), top)
        moving = np.select([kind == 0, kind == 1], [draw(motion, rng), ANIMATED], STILL)
        return Choice(subject, style, colour, np.stack([top, bottom], -1), moving)

    def attributes(self, choice: Choice) -> list[Attributes]:
        """The names of what was chosen."""
        shown = []
        fields = (choice.subject, choice.style, choice.colour, choice.ground, choice.motion)
        rows = zip(*(field.tolist() for field in fields), strict=True)
        for subject, style, colour, (top, bottom), motion in rows:
            background = (GROUND_NAMES[top],) if top == bottom else (GROUND_NAMES[top], GROUND_NAMES[bottom])
            named = COLOUR_NAMES[colour] if colour >= 0 else None
            shown.append(Attributes(self.atlas.names[subject], STYLES[style], named, background, MOTIONS[motion]))
        return shown

    def own_motion(self, choice: Choice) -> list[str]:
        """What each picture does when the caption does not say: its own animation if that is what a 3d subject has."""
        own = self.atlas.animated[choice.subject] & (choice.style == 0) & (choice.colour < 0)
        return ["animated" if moves else "still" for moves in own.tolist()]

    def captions(self, choice: Choice, rng: np.random.Generator) -> list[str]:
        """One caption a scene, some of them empty (`mix.empty`, for classifier-free guidance)."""
        dice = random.Random(int(rng.integers(2**62)))
        empty = (rng.random(len(choice.subject)) < self.mix.empty).tolist()
        rows = zip(self.attributes(choice), self.own_motion(choice), choice.subject.tolist(), empty, strict=True)
        return ["" if e else sentence(shown, own, dice, self.atlas.synonyms[s]) for shown, own, s, e in rows]

    def prompts_for_scoring(self, n: int, seed: int, held_out: bool = False) -> list[tuple[str, Attributes]]:
        """`n` prompts that say everything they are scored on, going round all motions and backgrounds evenly.

        With `held_out` the wordings are the held-out ones, and the pair of subject and motion, or of subject and background,
        is a held-out one wherever the round allows it. The same `n` and `seed` give the same list.
        """
        rng = np.random.default_rng(seed)
        dice = random.Random(seed)
        prompts = []
        offset = int(rng.integers(len(GROUND_NAMES)))
        for i in range(n):
            motion = i % len(MOTIONS)
            ground = (i + offset) % len(GROUND_NAMES)  # 12 and 13 have no common factor: every pair comes up
            choice = self._choose_for(motion, ground, gradient=i % 4 == 3, held_out=held_out, rng=rng)
            shown, own = self.attributes(choice)[0], self.own_motion(choice)[0]
            prompts.append((sentence(shown, own, dice, wording=HELD_OUT if held_out else TRAINING, drop=False), shown))
        return prompts

    def _choose_for(self, motion: int, ground: int, gradient: bool, held_out: bool, rng: np.random.Generator) -> Choice:
        """One scene with this motion and background; tries random subjects until one can have both."""
        pool = np.flatnonzero(self.atlas.animated) if motion == ANIMATED else np.arange(len(self.atlas.names))
        if held_out:
            held = self.rules.held_ground[:, ground].copy()
            if motion < len(PROCEDURAL):
                held |= self.rules.held_motion[:, motion]
            pool = pool[held[pool]] if held[pool].any() else pool
        for attempt in range(1000):
            subject = rng.choice(pool, 1)
            style = np.zeros(1, int) if motion == ANIMATED else rng.choice(len(STYLES), 1, p=self.mix.styles)
            style = np.where(self.atlas.sprite_index[subject, style] < 0, 0, style)
            paint = motion != ANIMATED and self.rules.colourable[subject[0]] and rng.random() < self.mix.coloured
            colour = draw(~self.rules.held_colour[subject], rng) if paint else np.full(1, -1)
            second = int(rng.integers(len(GROUND_NAMES))) if gradient else ground
            choice = Choice(subject, style, colour, np.array([[ground, second]]), np.array([motion]))
            grounds, motions = self.allowed(choice, keep_out=not held_out)
            fits = grounds[0, ground] and grounds[0, second] and (not gradient or second != ground)
            if (fits and (motion >= len(PROCEDURAL) or motions[0, motion])) or attempt == 999:
                return choice
        raise AssertionError("the last attempt returns")

    def vocabulary(self) -> list[str]:
        """Every word that a training caption of this atlas can hold."""
        return vocabulary(self.atlas.names, self.atlas.synonyms)


def draw(allowed: Bool[np.ndarray, "n words"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """One allowed index a row, uniformly (any index where none is allowed)."""
    return np.argmax(rng.random(allowed.shape) * (allowed + 1e-6), -1)
