"""Still pictures of one object, or of two beside each other: what they show, how it is told, and where the sprites stand.

    "a red apple left of a cat, flat style, on a blue background"

Both objects of a pair are in one style; each may be painted. Pairs of subject and background, subject and colour, and of the
first subject and its relation, that `held_out.json` lists are never chosen for training. Deterministic in the generator given.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from smartdiff_jax.training.data.atlas import STYLES, Atlas
from smartdiff_jax.training.data.captions import COLOUR_NAMES, GROUND_NAMES, Rules, draw
from smartdiff_jax.training.data.scenes import Scene, Sprite, grounds, tints
from smartdiff_jax.training.data.wording import (
    HELD_OUT,
    RELATIONS,
    TRAINING,
    Wording,
    named,
    pick,
    style_words,
    vocabulary,
    with_style_and_ground,
    words_of,
)

TOLD = {
    "left": ("left of", "to the left of", "on the left of", "standing left of", "that is left of"),
    "right": ("right of", "to the right of", "on the right of", "standing right of", "that is right of"),
    "above": ("above", "on top of", "high above", "that is above", "atop"),
    "below": ("below", "under", "beneath", "that is below", "far below", "underneath"),
}
TOLD_HELD_OUT = {
    "left": ("on the left side of", "just left of"),
    "right": ("on the right side of", "just right of"),
    "above": ("just above", "higher than"),
    "below": ("just below", "lower than"),
}
ALONE = -1
NOWHERE = -9.0  # the centre of a sprite that is not in the frame
APART = 0.24  # from the middle of the frame to the centre of either of two


@dataclass(frozen=True)
class PictureMix:
    """Shares of the training set; `styles` sum to 1."""

    pairs: float = 0.35
    styles: tuple[float, float, float] = (0.5, 0.25, 0.25)
    coloured: float = 0.3
    gradient: float = 0.2
    empty: float = 0.1


@dataclass(frozen=True)
class PictureChoice:
    """What `n` pictures show, as indices. Of an object that stands alone, the second subject and the relation are ALONE;
    colour -1 is the sprite's own; `ground` is (top, bottom)."""

    subject: Int[np.ndarray, "n 2"]
    style: Int[np.ndarray, " n"]
    colour: Int[np.ndarray, "n 2"]
    ground: Int[np.ndarray, "n 2"]
    relation: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class Thing:
    """An object by name; `colour` None is its own."""

    subject: str
    colour: str | None


@dataclass(frozen=True)
class PictureAttributes:
    """What a picture shows, by name: one thing, or two and where the first is, seen from the second."""

    things: tuple[Thing, ...]
    style: str
    background: tuple[str, ...]
    relation: str | None


class PictureCaptioner:
    """Draws choices and captions for one atlas; drawing is vectorised."""

    def __init__(self, atlas: Atlas, mix: PictureMix = PictureMix(), held_out: Mapping[str, Mapping[str, str]] | None = None):
        self.atlas, self.mix, self.rules = atlas, mix, Rules(atlas, held_out)

    def choose(self, n: int, rng: np.random.Generator) -> PictureChoice:
        """`n` training pictures in the shares of `mix`, without held-out pairs."""
        atlas, mix, count = self.atlas, self.mix, len(self.atlas.names)
        first = rng.integers(count, size=n)
        second = (first + rng.integers(1, count, size=n)) % count
        paired = rng.random(n) < mix.pairs
        style = rng.choice(len(STYLES), n, p=mix.styles)
        lacking = (atlas.sprite_index[first, style] < 0) | (paired & (atlas.sprite_index[second, style] < 0))
        style = np.where(lacking, 0, style)
        relation = np.where(paired, draw(~self.rules.held_relation[first], rng), ALONE)
        colour = np.stack([self.rules.paint(subject, mix.coloured, rng) for subject in (first, second)], -1)
        colour[~paired, 1] = -1
        subject = np.stack([first, np.where(paired, second, ALONE)], -1)
        choice = PictureChoice(subject, style, colour, np.zeros((n, 2), int), relation)
        ground = self.allowed(choice)
        top = draw(ground, rng)
        other = ground & (np.arange(len(GROUND_NAMES)) != top[:, None])
        split = (rng.random(n) < mix.gradient) & other.any(-1)
        bottom = np.where(split, draw(other, rng), top)
        return PictureChoice(subject, style, colour, np.stack([top, bottom], -1), relation)

    def allowed(self, choice: PictureChoice, keep_out: bool = True) -> Bool[np.ndarray, "n grounds"]:
        """The backgrounds that everything in each picture can be seen on."""
        both = []
        for which in (0, 1):
            subject = choice.subject[:, which]
            own = self.rules.grounds(
                self.atlas.sprite_index[subject, choice.style], subject, choice.colour[:, which], keep_out
            )  # fmt: skip
            both.append(own | (subject == ALONE)[:, None])
        # Where no background suits both, the first is the one to be seen; the second's held-out one stays out.
        second = choice.subject[:, 1]
        first_only = both[0] & (~self.rules.held_ground[second] | (second == ALONE)[:, None])
        together = both[0] & both[1]
        return np.where(together.any(-1, keepdims=True), together, first_only)

    def stage(self, choice: PictureChoice, rng: np.random.Generator) -> Scene:
        """Places the sprites: one in the middle, or two apart that do not touch. One frame."""
        n, alone = len(choice.subject), (choice.relation == ALONE)[:, None]

        def between(low: float, high: float) -> np.ndarray:
            return rng.uniform(low, high, (n, 1))

        large = np.where(rng.random((n, 1)) < 0.2, between(0.70, 0.82), between(0.55, 0.70))
        middle = 0.5 + rng.uniform(-0.06, 0.06, (n, 2))
        along = np.isin(choice.relation, [RELATIONS.index("left"), RELATIONS.index("right")])
        before = np.isin(choice.relation, [RELATIONS.index("left"), RELATIONS.index("above")])
        way = np.where(along[:, None], [[1.0, 0.0]], [[0.0, 1.0]]) * np.where(before, -1, 1)[:, None]
        sprites = []
        for which, sign in enumerate((1, -1)):
            jitter = rng.uniform(-0.02, 0.02, (n, 2)) + np.abs(way[:, ::-1]) * rng.uniform(-0.05, 0.05, (n, 1))
            apart = 0.5 + sign * APART * way + jitter
            side = np.where(alone, large, between(0.36, 0.44))
            sprites.append(
                Sprite(
                    image=np.maximum(self.atlas.sprite_index[choice.subject[:, which], choice.style], 0)[:, None].astype(
                        np.int32
                    ),
                    centre=np.where(alone, middle if which == 0 else NOWHERE, apart)[:, None].astype(np.float32),
                    side=side.astype(np.float32),
                    angle=np.zeros((n, 1), np.float32),
                    tint=tints(choice.colour[:, which]),
                )
            )
        return Scene(tuple(sprites), grounds(choice.ground, rng))

    def attributes(self, choice: PictureChoice) -> list[PictureAttributes]:
        """The names of what was chosen."""
        shown = []
        fields = (choice.subject, choice.style, choice.colour, choice.ground, choice.relation)
        for subjects, style, colours, (top, bottom), relation in zip(*(f.tolist() for f in fields), strict=True):
            things = tuple(
                Thing(self.atlas.names[subject], COLOUR_NAMES[colour] if colour >= 0 else None)
                for subject, colour in zip(subjects, colours, strict=True)
                if subject != ALONE
            )
            background = (GROUND_NAMES[top],) if top == bottom else (GROUND_NAMES[top], GROUND_NAMES[bottom])
            told = RELATIONS[relation] if relation != ALONE else None
            shown.append(PictureAttributes(things, STYLES[style], background, told))
        return shown

    def captions(self, choice: PictureChoice, rng: np.random.Generator) -> list[str]:
        """One caption a picture, some of them empty (`mix.empty`, for classifier-free guidance)."""
        dice = random.Random(int(rng.integers(2**62)))
        empty = (rng.random(len(choice.style)) < self.mix.empty).tolist()
        rows = zip(self.attributes(choice), choice.subject.tolist(), empty, strict=True)
        return ["" if e else sentence(shown, dice, [self.atlas.synonyms[s] for s in subjects]) for shown, subjects, e in rows]

    def prompts_for_scoring(self, n: int, seed: int, held_out: bool = False) -> list[tuple[str, PictureAttributes]]:
        """`n` prompts that say everything they are scored on, going round relations and backgrounds evenly: of every five,
        two show a pair.

        With `held_out` the wordings are the held-out ones, and the pair of first subject and relation, or of first subject and
        background, is a held-out one wherever the round allows it. The same `n` and `seed` give the same list.
        """
        rng, dice = np.random.default_rng(seed), random.Random(seed)
        offset, wording = int(rng.integers(len(GROUND_NAMES))), HELD_OUT if held_out else TRAINING
        prompts = []
        for i in range(n):
            relation = (i // 5 * 2 + i % 5 - 3) % len(RELATIONS) if i % 5 >= 3 else ALONE
            choice = self._choose_for(relation, (i + offset) % len(GROUND_NAMES), i % 7 == 6, held_out, rng)
            shown = self.attributes(choice)[0]
            prompts.append((sentence(shown, dice, wording=wording, drop=False), shown))
        return prompts

    def _choose_for(
        self, relation: int, ground: int, gradient: bool, held_out: bool, rng: np.random.Generator
    ) -> PictureChoice:
        """One picture with this relation and background; tries random subjects until one can have both."""
        pool = np.arange(len(self.atlas.names))
        if held_out:
            listed = self.rules.held_ground[:, ground] if relation == ALONE else self.rules.held_relation[:, relation]
            pool = np.flatnonzero(listed) if listed.any() else pool
        for attempt in range(1000):
            first = int(rng.choice(pool))
            second = (first + int(rng.integers(1, len(self.atlas.names)))) % len(self.atlas.names)
            subject = np.array([[first, second if relation != ALONE else ALONE]])
            style = rng.choice(len(STYLES), 1, p=self.mix.styles)
            style = np.where((self.atlas.sprite_index[subject[0, subject[0] >= 0], style] < 0).any(), 0, style)
            colour = np.stack([self.rules.paint(subject[:, which], 0.5, rng) for which in (0, 1)], -1)
            colour[subject < 0] = -1
            bottom = int(rng.integers(len(GROUND_NAMES))) if gradient else ground
            choice = PictureChoice(subject, style, colour, np.array([[ground, bottom]]), np.array([relation]))
            fits = self.allowed(choice, keep_out=not held_out)[0]
            kept = held_out or relation == ALONE or not self.rules.held_relation[first, relation]
            if (kept and fits[ground] and fits[bottom] and (not gradient or bottom != ground)) or attempt == 999:
                return choice
        raise AssertionError("the last attempt returns")

    def vocabulary(self) -> list[str]:
        """Every word that a training caption of this atlas can hold."""
        relations = [phrase for phrases in TOLD.values() for phrase in phrases]
        return words_of([*vocabulary(self.atlas.names, self.atlas.synonyms, moving=False), *relations])


def sentence(
    shown: PictureAttributes,
    dice: random.Random,
    synonyms: Sequence[Sequence[str]] = (),
    wording: Wording = TRAINING,
    drop: bool = True,
) -> str:
    """One caption of `shown`. With `drop`, a synonym may stand for a name, and words that may be omitted sometimes are: the
    style if it is 3d, the background, the articles."""
    style_before, style_after = style_words(shown.style, dice, wording, drop)
    heads = []
    for index, thing in enumerate(shown.things):
        others = synonyms[index] if synonyms else ()
        subject = dice.choice(others) if others and drop and dice.random() < 0.2 else thing.subject
        words = (style_before, thing.colour or "", subject)
        heads.append(named(" ".join(word for word in words if word), subject, dice, drop))
    if shown.relation is not None:
        relation = pick((TOLD if wording is TRAINING else TOLD_HELD_OUT)[shown.relation], dice, 0.6)
        heads = [f"{heads[0]} {relation} {heads[1]}"]
    return with_style_and_ground(heads[0], style_after, shown.background, dice, wording, drop)
