"""Scenes in motion: where a sprite is in every frame (NumPy, on the host), and the picture of it (JAX, on the device).

`Director.batch` gives captions and `Scene` arrays for a batch; `render` turns the arrays into video. A frame is
    alpha * sprite(A(p)) + (1 - alpha) * background(y)
(one sprite drawn after the other where there are several) with one bilinear look-up of premultiplied colour under the inverse
of the affine map A of centre, side and angle. A sprite and a frame of a clip are rows of the same packed array, so an animated
scene only changes its row from frame to frame.

Coordinates are fractions of the frame (x right, y down); angles are radians, clockwise as seen.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from smartdiff_jax.training.data.atlas import CLIP_FRAMES, Atlas
from smartdiff_jax.training.data.captions import ANIMATED, COLOUR_RGB, GROUND_RGB, Captioner, Choice, Mix
from smartdiff_jax.training.data.wording import MOTIONS, Attributes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sprite:
    """What one object does: `b` scenes of `t` frames. `tint` is r, g, b and its strength (0 or 1)."""

    image: Int[Array | np.ndarray, "*b t"]
    centre: Float[Array | np.ndarray, "*b t 2"]
    side: Float[Array | np.ndarray, "*b t"]
    angle: Float[Array | np.ndarray, "*b t"]
    tint: Float[Array | np.ndarray, "*b 4"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scene:
    """A batch of scenes: its sprites in the order they are drawn, and the `ground` behind them, top and bottom."""

    sprites: tuple[Sprite, ...]
    ground: Float[Array | np.ndarray, "*b 2 3"]


def stage(atlas: Atlas, choice: Choice, rng: np.random.Generator, frames: int = 17) -> Scene:
    """Places and moves the chosen subjects: sizes, positions, speeds and shades are drawn, the motion is as chosen."""
    n = len(choice.subject)
    u = np.linspace(0, 1, frames, dtype=np.float32)[None]

    def between(low, high):
        return rng.uniform(low, high, (n, 1)).astype(np.float32)

    side = np.where(rng.random((n, 1)) < 0.2, between(0.70, 0.82), between(0.55, 0.70)).astype(np.float32)
    free = 0.06  # of the frame: nobody asks for a place, so it is the middle, but not to the pixel
    x0, y0 = 0.5 + free * between(-1, 1), 0.5 + free * between(-1, 1)
    x, y, size, angle = (np.repeat(a, frames, 1) for a in (x0, y0, side, np.zeros_like(side)))
    is_ = {name: choice.motion == index for index, name in enumerate(MOTIONS)}

    travelling = is_["left"] | is_["right"] | is_["up"] | is_["down"]
    travel_side = between(0.44, 0.60)
    # From one side of the middle to the other; at most an eighth of the sprite leaves the frame.
    reach = np.minimum(between(0.15, 0.25), 0.5 - travel_side * 0.375)
    path = reach * (2 * u - 1)
    for name, sign in (("left", -1), ("right", 1)):
        x[is_[name]] = (0.5 + sign * path)[is_[name]]
    for name, sign in (("up", -1), ("down", 1)):
        y[is_[name]] = (0.5 + sign * path)[is_[name]]
    size[travelling] = np.repeat(travel_side, frames, 1)[travelling]

    spinning = is_["clockwise"] | is_["counterclockwise"]
    turn = between(np.pi, 2 * np.pi) * u
    angle[is_["clockwise"]] = turn[is_["clockwise"]]
    angle[is_["counterclockwise"]] = -turn[is_["counterclockwise"]]
    size[spinning] = np.repeat(between(0.55, 0.68), frames, 1)[spinning]

    small, large = between(0.32, 0.42), between(0.74, 0.86)
    growing = small * (large / small) ** u  # an even rate of zoom
    size[is_["grow"]], size[is_["shrink"]] = growing[is_["grow"]], growing[:, ::-1][is_["shrink"]]

    bounce_side, height = between(0.46, 0.60), between(0.18, 0.28)
    hops = np.where(rng.random((n, 1)) < 0.5, 2, 3)
    hop = 0.96 - bounce_side / 2 - height * np.abs(np.sin(np.pi * hops * u))
    y[is_["bounce"]], size[is_["bounce"]] = hop[is_["bounce"]], np.repeat(bounce_side, frames, 1)[is_["bounce"]]

    tremble = between(0.05, 0.08) * np.sin(2 * np.pi * 4 * u) * rng.choice([-1, 1], (n, 1))
    x[is_["shake"]] = (0.5 + tremble)[is_["shake"]]
    sway = between(np.radians(22), np.radians(38)) * np.sin(2 * np.pi * np.where(rng.random((n, 1)) < 0.5, 1, 2) * u)
    sway = (sway * rng.choice([-1, 1], (n, 1))).astype(np.float32)
    size[is_["swing"]] = np.repeat(between(0.52, 0.66), frames, 1)[is_["swing"]]
    arm = 0.5 * size[:, :1]  # it hangs from the middle of its upper edge
    angle[is_["swing"]] = sway[is_["swing"]]
    x[is_["swing"]] = (0.5 - arm * np.sin(sway))[is_["swing"]]
    y[is_["swing"]] = (0.5 + arm * (np.cos(sway) - 1))[is_["swing"]]
    centred = spinning | is_["grow"] | is_["shrink"]
    x[centred | is_["up"] | is_["down"] | is_["bounce"]] = 0.5
    y[centred | is_["left"] | is_["right"]] = 0.5

    sprite = np.repeat(atlas.sprite_index[choice.subject, choice.style][:, None], frames, 1)
    clip_frame = np.floor(np.arange(frames) * CLIP_FRAMES / frames).astype(int)
    clip = len(atlas.sprites) + atlas.clip_index[choice.subject][:, None] * CLIP_FRAMES + clip_frame
    sprite = Sprite(
        image=np.where((choice.motion == ANIMATED)[:, None], clip, sprite).astype(np.int32),
        centre=np.stack([x, y], -1).astype(np.float32),
        side=size.astype(np.float32),
        angle=angle.astype(np.float32),
        tint=tints(choice.colour),
    )
    return Scene((sprite,), grounds(choice.ground, rng))


def tints(colour: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n 4"]:
    """Of colours by index; -1 leaves the sprite's own."""
    return np.concatenate([COLOUR_RGB[colour], (colour >= 0)[:, None]], -1).astype(np.float32)


def grounds(ground: Int[np.ndarray, "n 2"], rng: np.random.Generator) -> Float[np.ndarray, "n 2 3"]:
    """Of colours by index, each scene in a shade of its own."""
    shade = rng.uniform(-0.03, 0.03, (len(ground), 1, 3))
    return np.clip(GROUND_RGB[ground] + shade, 0, 1).astype(np.float32)


class Director:
    """Captioned scenes of one atlas. `bank` goes to the device once; `batch` is cheap and deterministic in `rng`."""

    def __init__(self, atlas: Atlas, mix: Mix = Mix(), frames: int = 17):
        self.atlas, self.frames = atlas, frames
        self.captioner = Captioner(atlas, mix)

    def bank(self) -> UInt32[np.ndarray, "images side side"]:
        """All pictures, RGBA packed into 32 bits (about 190 MB): `jax.device_put` it and hand it to `render`."""
        return pack(self.atlas.bank())

    def batch(self, n: int, rng: np.random.Generator) -> tuple[Scene, list[str], list[Attributes]]:
        """`n` training scenes, their captions (some empty), and what they really show."""
        choice = self.captioner.choose(n, rng)
        scene = stage(self.atlas, choice, rng, self.frames)
        return scene, self.captioner.captions(choice, rng), self.captioner.attributes(choice)


def pack(images: np.ndarray) -> UInt32[np.ndarray, "images side side"]:
    """uint8 [n, side, side, 4] as one little-endian word a pixel: one gather fetches all four channels."""
    return np.ascontiguousarray(images).view("<u4")[..., 0]


def _channels(words: UInt32[Array, "*n"]) -> tuple[Float[Array, "*n"], ...]:
    return tuple(((words >> shift) & 255).astype(jnp.float32) for shift in (0, 8, 16, 24))


def _tinted(alpha, rgb, tint):
    """Brightness of the sprite on a ramp from dark, through the named colour, to pale."""
    light = sum(w * c for w, c in zip((0.3, 0.59, 0.11), rgb, strict=True)) / jnp.maximum(alpha, 1e-3)
    low, high = jnp.clip(light / 0.65, 0, 1), jnp.clip((light - 0.65) / 0.35, 0, 1)
    ramp = [t * (0.2 + 0.8 * low) + (1 - t) * 0.7 * high for t in tint[:3]]
    return [tint[3] * alpha * r + (1 - tint[3]) * c for r, c in zip(ramp, rgb, strict=True)]


def render(
    bank: UInt32[Array, "images side side"], scene: Scene, height: int = 96, width: int = 96
) -> Float[Array, "b t height width 3"]:
    """Draws a batch of scenes in [-1, 1]. Pure, for use inside a training step; a sprite's side is of the height."""
    down = ((jnp.arange(height) + 0.5) / height)[None, None, :, None]
    top_rgb, bottom_rgb = ([scene.ground[:, i, c, None, None, None] for c in range(3)] for i in (0, 1))
    frame = [a + (b - a) * down for a, b in zip(top_rgb, bottom_rgb, strict=True)]
    for sprite in scene.sprites:
        rgb, alpha = _drawn(bank, sprite, height, width)
        frame = [c + (1 - alpha) * g for c, g in zip(rgb, frame, strict=True)]
    return 2 * jnp.clip(jnp.stack(frame, -1), 0, 1) - 1


def _drawn(
    bank: UInt32[Array, "images side side"], sprite: Sprite, height: int, width: int
) -> tuple[list[Float[Array, "b t h w"]], Float[Array, "b t h w"]]:
    """A sprite's premultiplied colours and its alpha, where it stands."""
    side = bank.shape[-1]
    px = (jnp.arange(width) + 0.5)[None, None, None, :]
    py = (jnp.arange(height) + 0.5)[None, None, :, None]
    per_frame = lambda a: a[:, :, None, None]  # noqa: E731
    dx = px - per_frame(sprite.centre[..., 0]) * width
    dy = py - per_frame(sprite.centre[..., 1]) * height
    cos, sin = per_frame(jnp.cos(sprite.angle)), per_frame(jnp.sin(sprite.angle))
    zoom = per_frame(side / (sprite.side * height))
    u = (cos * dx + sin * dy) * zoom + side / 2 - 0.5
    v = (cos * dy - sin * dx) * zoom + side / 2 - 0.5
    inside = (u > 0) & (u < side - 1) & (v > 0) & (v < side - 1)
    u, v = jnp.clip(u, 0, side - 1.001), jnp.clip(v, 0, side - 1.001)
    left, top = jnp.floor(u), jnp.floor(v)
    fu, fv = u - left, v - top
    start = (per_frame(sprite.image) * side + top.astype(jnp.int32)) * side + left.astype(jnp.int32)
    flat = bank.reshape(-1)
    total: list[Any] = [0.0, 0.0, 0.0, 0.0]
    for offset, weight in ((0, (1 - fu) * (1 - fv)), (1, fu * (1 - fv)), (side, (1 - fu) * fv), (side + 1, fu * fv)):
        corner = _channels(flat.at[start + offset].get(mode="promise_in_bounds"))
        total = [sum_ + weight * channel for sum_, channel in zip(total, corner, strict=True)]
    rgb: list[Any]
    *rgb, alpha = (jnp.where(inside, channel / 255, 0) for channel in total)
    tint = [sprite.tint[:, i, None, None, None] for i in range(4)]
    return _tinted(alpha, rgb, tint), alpha
