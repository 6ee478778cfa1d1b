"""Did the video show what was asked? Background, motion, subject, colour and style, measured without any learned weights.

Everything rests on the background: it is fitted to the border as a colour that changes linearly from top to bottom, and
    D = frame - background
is what stands before it. The motion is read from D's centroid, extent and rotation (correlation in polar coordinates from frame
to frame). The subject is found by the cosine between D, cropped to what it covers, and every sprite of the atlas in every
style drawn before the same background, alpha * (colour - background): parts of a sprite that look like the background count for
nothing on both sides. NumPy only; made apart from the models, and from the renderer but for its palette.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

from smartdiff_jax.training.data.atlas import STYLES, Atlas
from smartdiff_jax.training.data.wording import BACKGROUNDS, COLOURS, Attributes

CELLS = 24  # side of the pictures that are compared
SPAN = 3.2  # side of a crop over the root mean square distance of what it shows from its centroid: a disc fills 88 %
# How a crop may be off, because a part of a sprite is not seen: its side, and its centre by shares of its side.
NUDGES = (
    (1.0, 0.0, 0.0),
    (0.92, 0.0, 0.0),
    (1.08, 0.0, 0.0),
    (1.0, 0.05, 0.0),
    (1.0, -0.05, 0.0),
    (1.0, 0.0, 0.05),
    (1.0, 0.0, -0.05),
)
ANGLES = 72  # steps of the polar grid: 5 degrees each
GROUP = 4  # frames to a latent
GROUND_NAMES, GROUND_RGB = tuple(BACKGROUNDS), np.array(list(BACKGROUNDS.values()), np.float32)
COLOUR_NAMES, COLOUR_RGB = tuple(COLOURS), np.array(list(COLOURS.values()), np.float32)
# A picture's own animation may sway, hop, tremble or swell; it may not cross the frame, spin round or stand still.
OWN_ANIMATION = frozenset({"animated", "swing", "bounce", "shake", "grow", "shrink"})


@dataclass(frozen=True)
class Foreground:
    """What stands before the background (`mask` is 0 or 1), and the background's colours at both ends."""

    difference: Float[np.ndarray, "t h w 3"]
    mask: Float[np.ndarray, "t h w"]
    top: Float[np.ndarray, " 3"]
    bottom: Float[np.ndarray, " 3"]


def _box(image: Float[np.ndarray, "*n h w"]) -> Float[np.ndarray, "*n h w"]:
    """Mean over 3 x 3 pixels."""
    padded = np.pad(image, [(0, 0)] * (image.ndim - 2) + [(1, 1), (1, 1)], mode="edge")
    h, w = image.shape[-2:]
    return np.sum([padded[..., i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0) / 9


def foreground(frames: UInt8[np.ndarray, "t h w 3"]) -> Foreground:
    """Fits the background to the border of all frames, robustly, and takes it away."""
    video = frames.astype(np.float32) / 255
    height = video.shape[1]
    edge = max(2, height // 24)
    sides = np.concatenate([video[:, :, :edge], video[:, :, -edge:]], 2)  # [t, h, 2 edge, 3]
    rows = np.median(sides, axis=(0, 2))
    rows[:edge] = np.median(video[:, :edge], axis=(0, 2))
    rows[-edge:] = np.median(video[:, -edge:], axis=(0, 2))
    down = (np.arange(height, dtype=np.float32) + 0.5) / height
    design = np.stack([1 - down, down], -1)
    weight = np.ones(height, np.float32)
    ends = np.zeros((2, 3), np.float32)
    for _ in range(12):  # iteratively reweighted least squares towards the least absolute error
        ends = np.linalg.lstsq(design * weight[:, None], rows * weight[:, None], rcond=None)[0]
        weight = 1 / np.sqrt(np.maximum(np.abs(rows - design @ ends).sum(-1), 0.01))
    difference = video - (design @ ends)[None, :, None]
    smooth = np.stack([_box(difference[..., c]) for c in range(3)], -1)
    mask = (np.linalg.norm(smooth, axis=-1) > 0.11).astype(np.float32)
    mask *= _box(mask) > 0.4  # lone specks
    return Foreground(difference, mask, ends[0], ends[1])


def nearest(colour: Float[np.ndarray, " 3"], names: tuple[str, ...], table: Float[np.ndarray, "n 3"]) -> str:
    """The name of the closest colour."""
    return names[int(np.argmin(((table - colour) ** 2).sum(-1)))]


def background(scene: Foreground) -> tuple[str, ...]:
    """One colour name, or two from top to bottom where the ends differ by more than the shades of one name do."""
    top, bottom = (nearest(c, GROUND_NAMES, GROUND_RGB) for c in (scene.top, scene.bottom))
    if top == bottom or np.linalg.norm(scene.top - scene.bottom) < 0.2:
        return (nearest((scene.top + scene.bottom) / 2, GROUND_NAMES, GROUND_RGB),)
    return (top, bottom)


@dataclass(frozen=True)
class Track:
    """Per frame: centre (x, y) and size as fractions of the frame; turn from the frame before, in degrees, clockwise."""

    centre: Float[np.ndarray, "t 2"]
    size: Float[np.ndarray, " t"]
    turn: Float[np.ndarray, " t"]
    change: float


def _sample(image: Float[np.ndarray, "h w c"], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear look-up; zero outside."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    x, y = np.clip(x + 1, 0, width + 0.99), np.clip(y + 1, 0, height + 0.99)
    left, top = x.astype(int), y.astype(int)
    fx, fy = (x - left)[..., None].astype(np.float32), (y - top)[..., None].astype(np.float32)
    upper = padded[top, left] * (1 - fx) + padded[top, left + 1] * fx
    lower = padded[top + 1, left] * (1 - fx) + padded[top + 1, left + 1] * fx
    return upper * (1 - fy) + lower * fy


def _centroid(mask: Float[np.ndarray, "h w"]) -> tuple[float, float]:
    height, width = mask.shape
    total = max(float(mask.sum()), 1e-6)
    return float((mask.sum(0) * np.arange(width)).sum()) / total, float((mask.sum(1) * np.arange(height)).sum()) / total


def track(scene: Foreground) -> Track:
    """Follows what stands before the background through the frames."""
    frames, height, width = scene.mask.shape
    shown = scene.difference * scene.mask[..., None]
    centre = np.array([_centroid(mask) for mask in scene.mask], np.float32)
    size = np.sqrt(scene.mask.mean((1, 2)))
    angle = np.arange(ANGLES) * 2 * np.pi / ANGLES
    spectra = []
    for t in range(frames):
        reach = 1.6 * max(size[t], 0.05) * height / np.sqrt(np.pi)
        radius = (np.arange(16) + 1) / 16 * reach
        x = centre[t, 0] + radius[None] * np.cos(angle)[:, None]
        y = centre[t, 1] + radius[None] * np.sin(angle)[:, None]
        polar = _sample(np.concatenate([shown[t], 0.5 * scene.mask[t][..., None]], -1), x, y) * np.sqrt(radius)[None, :, None]
        spectra.append(np.fft.rfft(polar - polar.mean(0), axis=0))
    turn = np.zeros(frames, np.float32)
    for t in range(1, frames):
        correlation = np.fft.irfft((spectra[t] * spectra[t - 1].conj()).sum((1, 2)), ANGLES)
        turn[t] = _peak(correlation)
    blurred = np.stack([_box(_box(shown[..., c])) for c in range(3)], -1)
    covered = max(float((scene.mask.max(0) > 0).mean()), 1e-3)
    # Frames a whole group of latents apart: an autoencoder paints the frames within a group alike in every group, each a little
    # differently, and a still clip that has been through one must be still.
    change = max(float(np.abs(blurred[p::GROUP] - blurred[p]).mean((1, 2, 3)).max()) for p in range(1, 1 + GROUP)) / covered
    return Track(centre / np.array([width, height], np.float32), size, turn, change)


def _peak(correlation: Float[np.ndarray, " n"], limit: int = 10) -> float:
    """The shift of the highest correlation within 50 degrees, refined by a parabola; in degrees."""
    shifts = np.arange(-limit, limit + 1)
    # Among the equal peaks of a wheel or a web the smallest turn is meant.
    near = correlation[shifts] / max(float(correlation.max()), 1e-9) - 0.01 * np.abs(shifts)
    best = int(np.argmax(near))
    if best in (0, 2 * limit):
        return float(shifts[best] * 360 / ANGLES)
    low, mid, high = near[best - 1 : best + 2]
    bend = low - 2 * mid + high
    return float((shifts[best] + (0.5 * (low - high) / bend if bend < 0 else 0)) * 360 / ANGLES)


def _reversals(values: Float[np.ndarray, " t"], least: float) -> int:
    """How often a track turns back, counting only swings of at least `least`."""
    turns, direction, extreme = 0, 0, float(values[0])
    for value in values.tolist():
        if direction >= 0 and value < extreme - least or direction <= 0 and value > extreme + least:
            turns += direction != 0
            direction = 1 if value > extreme else -1
            extreme = value
        elif direction > 0 and value > extreme or direction < 0 and value < extreme:
            extreme = value
    return turns


def motion(seen: Track) -> str:
    """The name of the motion; "none" if there is nothing to be seen in half of the frames."""
    if np.median(seen.size) < 0.04:
        return "none"
    total = np.cumsum(seen.turn)
    size = seen.size / max(float(seen.size.mean()), 1e-6)
    x, y = seen.centre[:, 0], seen.centre[:, 1]
    if abs(total[-1]) > 110 and np.mean(np.sign(seen.turn[1:]) == np.sign(total[-1])) > 0.75:
        return "clockwise" if total[-1] > 0 else "counterclockwise"
    zoom = np.log(max(size[-2:].mean(), 1e-3) / max(size[:2].mean(), 1e-3))
    if abs(zoom) > 0.35:
        return "grow" if zoom > 0 else "shrink"
    dx, dy = x[-2:].mean() - x[:2].mean(), y[-2:].mean() - y[:2].mean()
    if max(abs(dx), abs(dy)) > 0.18:
        if abs(dx) > abs(dy):
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"
    if np.ptp(x) > 0.06 and _reversals(x, 0.03) >= 5:
        return "shake"
    if np.ptp(total) > 25:
        return "swing"
    if np.ptp(y) > 0.1 and _reversals(y, 0.06) >= 2:
        return "bounce"
    return "animated" if seen.change > 0.02 else "still"


def _extent(mask: Bool[np.ndarray, "h w"]) -> tuple[Float[np.ndarray, " 2"], float]:
    """Centroid (x, y) and side of the square to compare: by moments, which a small part hardly moves."""
    y, x = np.nonzero(mask)
    points = np.stack([x, y], -1).astype(np.float32)
    centre = points.mean(0)
    return centre, SPAN * float(np.sqrt(((points - centre) ** 2).sum(-1).mean() + 0.25))


def _crops(
    picture: Float[np.ndarray, "h w c"],
    centre: Float[np.ndarray, " 2"],
    side: float,
    turns: Sequence[float] = (0.0,),
    nudges: Sequence[tuple[float, float, float]] = NUDGES[:1],
) -> Float[np.ndarray, "n cells cells c"]:
    """A square of a picture as CELLS x CELLS, for every turn back (radians, clockwise) and every nudge."""
    # Twice as many look-ups as cells, averaged: the crop is reduced, and must not alias.
    steps = (np.arange(2 * CELLS, dtype=np.float32) + 0.5) / (2 * CELLS) - 0.5
    grid = np.stack(np.meshgrid(steps, steps), -1)
    at = np.stack([grid * zoom + (dx, dy) for zoom, dx, dy in nudges])
    cos, sin = np.cos(turns), np.sin(turns)
    axes = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], 1)
    source = side * np.einsum("nuvi,kij->nkuvj", at, axes) + centre
    fine = _sample(picture, source[..., 0], source[..., 1])
    return fine.reshape(-1, CELLS, 2, CELLS, 2, picture.shape[-1]).mean((2, 4))


class Looks:
    """Pictures P with alpha A, ready to be compared before any background g: the cosine of crops u with P - A g.

    g is one colour a row of cells, so u.(P - A g) and |P - A g|^2 need only the row sums of P A and A^2, made once.
    """

    def __init__(self, pictures: Float[np.ndarray, "n cells cells 4"]):
        colour, alpha = pictures[..., :3], pictures[..., 3]
        self.colour, self.alpha = colour.reshape(len(colour), -1), alpha.reshape(len(alpha), -1)
        self.square = (self.colour**2).sum(-1)
        self.colour_alpha = np.einsum("nrcx,nrc->nrx", colour, alpha)
        self.alpha_square = (alpha**2).sum(-1)

    def cosine(
        self, crops: Float[np.ndarray, "k cells cells 3"], ground: Float[np.ndarray, "cells 3"]
    ) -> Float[np.ndarray, " n"]:
        """The best cosine of any crop with every picture."""
        unit = crops / np.sqrt(np.maximum((crops**2).sum((1, 2, 3), keepdims=True), 1e-12))
        behind = np.einsum("krcx,rx->krc", unit, ground).reshape(len(unit), -1)
        inner = (self.colour @ unit.reshape(len(unit), -1).T - self.alpha @ behind.T).max(-1)
        cross = np.einsum("nrx,rx->n", self.colour_alpha, ground)
        square = self.square - 2 * cross + self.alpha_square @ (ground**2).sum(-1)
        return inner / np.sqrt(np.maximum(square, 1e-6))


class Gallery:
    """What a subject is compared with: every sprite of an atlas, and every fourth frame of its clips, cropped."""

    def __init__(self, atlas: Atlas):
        self.atlas = atlas
        pictures, owner, style = [], [], []
        for subject in range(len(atlas.names)):
            for index in range(len(STYLES)):
                if (sprite := atlas.sprite_index[subject, index]) >= 0:
                    pictures.append(atlas.sprites[sprite])
                    owner.append(subject)
                    style.append(index)
            if (clip := atlas.clip_index[subject]) >= 0:
                for frame in atlas.clips[clip][::4]:
                    pictures.append(frame)
                    owner.append(subject)
                    style.append(0)
        self.owner, self.style = np.array(owner), np.array(style)
        self.pictures = np.stack([self._fit(picture) for picture in pictures])
        self._first = np.flatnonzero(np.diff(self.owner, prepend=-1))
        self._looks = {"": Looks(self.pictures)}

    @staticmethod
    def _fit(picture: UInt8[np.ndarray, "h w 4"]) -> Float[np.ndarray, "cells cells 4"]:
        mask = picture[..., 3] > 64
        if not mask.any():
            return np.zeros((CELLS, CELLS, 4), np.float32)
        return _crops(picture.astype(np.float32) / 255, *_extent(mask))[0]

    def looks(self, colour: str | None) -> list["Looks"]:
        """The pictures as they are and, if a colour is named, in shades of it."""
        if colour is None:
            return [self._looks[""]]
        if colour not in self._looks:
            alpha = self.pictures[..., 3:]
            light = self.pictures[..., :3] @ np.array([0.3, 0.59, 0.11], np.float32)
            light = light[..., None] / np.maximum(alpha, 1e-3)
            low, high = np.clip(light / 0.65, 0, 1), np.clip((light - 0.65) / 0.35, 0, 1)
            rgb = np.array(COLOURS[colour], np.float32)
            ramp = rgb * (0.2 + 0.8 * low) + (1 - rgb) * 0.7 * high
            self._looks[colour] = Looks(np.concatenate([alpha * ramp, alpha], -1).astype(np.float32))
        return [self._looks[""], self._looks[colour]]

    def by_subject(self, scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " subjects"]:
        """The best score of each subject's pictures."""
        return np.maximum.reduceat(scores, self._first)


def likeness(scene: Foreground, gallery: Gallery, colour: str | None = None, turning: bool = False) -> Float[np.ndarray, " n"]:
    """How much every picture of the gallery looks like what the video shows: the mean over some frames of the best cosine."""
    frames, height = scene.mask.shape[:2]
    turns = np.radians(np.arange(0, 360, 15)).tolist() if turning else [0.0]
    total = np.zeros(len(gallery.owner), np.float32)
    chosen = np.unique(np.linspace(0, frames - 1, 3 if turning else 5).round().astype(int))
    for t in chosen:
        if scene.mask[t].sum() < 12:
            continue
        centre, side = _extent(scene.mask[t] > 0)
        crops = _crops(scene.difference[t] * scene.mask[t][..., None], centre, side, turns, NUDGES[:3] if turning else NUDGES)
        if not turning:
            crops = np.concatenate([crops, crops[:, :, ::-1]])
        at = ((centre[1] + side * ((np.arange(CELLS) + 0.5) / CELLS - 0.5) + 0.5) / height)[:, None].clip(0, 1)
        ground = (scene.top * (1 - at) + scene.bottom * at).astype(np.float32)
        total += np.max([looks.cosine(crops, ground) for looks in gallery.looks(colour)], 0)
    return total / len(chosen)


def object_colour(scene: Foreground) -> str:
    """The hue of most of what stands before the background; "" if nothing does."""
    down = ((np.arange(scene.mask.shape[1]) + 0.5) / scene.mask.shape[1])[None, :, None, None]
    shown = scene.mask > 0
    if not shown.any():
        return ""
    rgb = (scene.difference + scene.top * (1 - down) + scene.bottom * down)[shown]
    # Pixels on an edge are part background; those that differ most are not.
    strength = np.linalg.norm(scene.difference[shown], axis=-1)
    rgb = rgb[strength >= np.median(strength)]
    chroma = rgb - rgb.mean(-1, keepdims=True)
    named = COLOUR_RGB - COLOUR_RGB.mean(-1, keepdims=True)
    named = named / np.linalg.norm(named, axis=-1, keepdims=True)
    votes = np.argmax(chroma @ named.T, -1)
    counts = np.bincount(votes, np.linalg.norm(chroma, axis=-1), len(COLOUR_NAMES))
    return COLOUR_NAMES[int(np.argmax(counts))]


def score(frames: UInt8[np.ndarray, "t h w 3"], asked: Attributes, gallery: Gallery) -> Mapping[str, int | bool | str]:
    """Holds one video against what was asked.

    `subject_rank` counts from 1 among all subjects; `background_ok` (the colours asked for and no others),
    `gradient_order_ok` (the first on top besides, as in training), `motion_ok`, `style_ok` and `colour_ok` (True where no
    colour was asked) are with what was seen: `background`, `motion`, `colour`, `subject` (the best match).
    """
    scene = foreground(frames)
    seen_background, seen_motion = background(scene), motion(track(scene))
    scores = likeness(scene, gallery, asked.colour, asked.motion in ("clockwise", "counterclockwise", "swing"))
    subjects = gallery.by_subject(scores)
    target = gallery.atlas.subject(asked.subject)
    own = np.flatnonzero(gallery.owner == target)
    seen_colour = object_colour(scene)
    return {
        "subject_rank": int((subjects >= subjects[target]).sum()),
        # "red to blue" does not say which of the two is on top, so the order is a question of its own.
        "background_ok": sorted(seen_background) == sorted(asked.background),
        "gradient_order_ok": seen_background == asked.background,
        "motion_ok": seen_motion in OWN_ANIMATION if asked.motion == "animated" else seen_motion == asked.motion,
        "style_ok": STYLES[int(gallery.style[own[np.argmax(scores[own])]])] == asked.style,
        "colour_ok": asked.colour is None or seen_colour == asked.colour,
        "subject": gallery.atlas.names[int(np.argmax(subjects))],
        "background": " to ".join(seen_background),
        "motion": seen_motion,
        "colour": seen_colour,
    }
