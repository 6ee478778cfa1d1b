"""Motion between frames, and how far a clip is from moving as it should: the warping error.

Flow is matched blocks, coarse to fine: at every scale the second frame is warped by what is known, and windows of it are
looked for around each pixel, and the best is placed between pixels by a parabola. No network, so no weights;
motion of up to about 30 pixels a frame is found, and plain areas are taken to rest.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float

from smartdiff_jax.evaluation.metrics import Clip, check_shapes, check_side

WINDOW = 9
RADII = (4, 2, 2, 2)
"""How far a match is looked for at each scale, the coarsest first; each is half of the next."""

REST = 1e-5
"""What a pixel of motion costs beside the mean square of grey levels 0 to 1: plain areas keep still."""

LEAST_SIDE = WINDOW << (len(RADII) - 1)
Flow = Float[Array, "h w 2"]
"""Pixels down and to the right, by which a frame's pixel lies elsewhere in the other frame."""


def warping_error(clip: Clip, flows: list[tuple[Flow, Bool[Array, "h w"]]]) -> float:
    """Mean square of what is left of each frame when the next is warped back onto it, colours 0 to 1, over pixels that both
    show (Lai et al. 2018). 0 for a picture. flows: of the clip that tells the motion, see `motion`."""
    if len(clip) < 2:
        return 0.0
    pairs = zip(clip[:-1], clip[1:], flows, strict=True)
    return float(np.mean([_left(first, second, *flow) for first, second, flow in pairs]))


def motion(clip: Clip) -> list[tuple[Flow, Bool[Array, "h w"]]]:
    """For each frame but the last its flow to the next, and where it can be told: where the way back leads home."""
    check_side("warping", clip, LEAST_SIDE)
    return [_there_and_back(first, second) for first, second in zip(clip[:-1], clip[1:], strict=True)]


def warping_errors(true: Clip, other: Clip, flows: list[tuple[Flow, Bool[Array, "h w"]]]) -> dict[str, float]:
    """Of the other along the reference's motion, and how much more it is than the reference's own."""
    check_shapes(true, other)
    error = warping_error(other, flows)
    return {"warping_error": error, "warping_change": error - warping_error(true, flows)}


@jax.jit
def _there_and_back(first: Array, second: Array) -> tuple[Flow, Bool[Array, "h w"]]:
    a, b = (jnp.mean(frame.astype(jnp.float32) / 255, axis=-1) for frame in (first, second))
    there, back = lax.map(lambda pair: optical_flow(*pair), (jnp.stack([a, b]), jnp.stack([b, a])))
    # Sundaram, Brox and Keutzer 2010: more than this apart, the pixel is hidden in the other frame.
    home = there + _warped(back, there)
    apart = jnp.sum(home**2, axis=-1)
    lengths = jnp.sum(there**2 + _warped(back, there) ** 2, axis=-1)
    rows, columns = _grid(there)
    inside = (rows >= 0) & (rows <= a.shape[0] - 1) & (columns >= 0) & (columns <= a.shape[1] - 1)
    return there, inside & (apart <= 0.01 * lengths + 0.5)


@jax.jit
def _left(first: Array, second: Array, flow: Flow, told: Bool[Array, "h w"]) -> Float[Array, ""]:
    a, b = (frame.astype(jnp.float32) / 255 for frame in (first, second))
    square = jnp.mean((a - _warped(b, flow)) ** 2, axis=-1)
    return jnp.sum(square * told) / jnp.maximum(jnp.sum(told), 1)


def optical_flow(a: Float[Array, "h w"], b: Float[Array, "h w"]) -> Flow:
    """From `a` to `b`, grey levels 0 to 1."""
    scales = [(a, b)]
    for _ in RADII[1:]:
        scales.append((_halved(scales[-1][0]), _halved(scales[-1][1])))
    flow = jnp.zeros((*scales[-1][0].shape, 2))
    for (x, y), radius in zip(reversed(scales), RADII, strict=True):
        if flow.shape[:2] != x.shape:
            flow = 2 * jax.image.resize(flow, (*x.shape, 2), "linear")
        flow = _median(flow + _match(x, _warped(y[..., None], flow)[..., 0], radius))
    return flow


def _match(a: Float[Array, "h w"], b: Float[Array, "h w"], radius: int) -> Flow:
    """The displacement within a radius whose window is most alike."""
    steps = np.arange(-radius, radius + 1)
    padded = jnp.pad(b, radius, mode="edge")

    def cost(step: Array) -> Float[Array, "h w"]:
        there = lax.dynamic_slice(padded, tuple(step + radius), a.shape)
        return _windowed((a - there) ** 2) + REST * jnp.sum(step**2)

    moves = jnp.asarray(np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2))
    costs = lax.map(cost, moves)
    best = jnp.argmin(costs, axis=0)
    return moves[best] + jnp.stack([_between(costs, best, stride, radius) for stride in (len(steps), 1)], axis=-1)


def _between(costs: Float[Array, "m h w"], best: Array, stride: int, radius: int) -> Float[Array, "h w"]:
    """Where the parabola through the least cost and its neighbours is least; 0 at the edge of what was looked at."""
    side = 2 * radius + 1
    place = best // side if stride > 1 else best % side
    low, at, high = (
        jnp.take_along_axis(costs, jnp.clip(best + move, 0, len(costs) - 1)[None], axis=0)[0] for move in (-stride, 0, stride)
    )
    bend = low + high - 2 * at
    # A perfect match is where it is: the parabola would move it, as texture is not the same on both sides.
    inner = (place > 0) & (place < side - 1) & (bend > 1e-9) & (at > 1e-8)
    return jnp.where(inner, jnp.clip((low - high) / (2 * jnp.where(inner, bend, 1.0)), -0.5, 0.5), 0.0)


def _windowed(x: Float[Array, "h w"]) -> Float[Array, "h w"]:
    """Means of windows around each pixel."""
    padded = jnp.pad(x, WINDOW // 2, mode="edge")
    for window in ((WINDOW, 1), (1, WINDOW)):
        padded = lax.reduce_window(padded, 0.0, lax.add, window, (1, 1), "VALID") / WINDOW
    return padded


def _median(flow: Flow) -> Flow:
    """Of five neighbours, down and then across: a warp that is torn here and there would be matched at its tears."""
    for axis in range(2):
        padded = jnp.pad(flow, [(2, 2) if each == axis else (0, 0) for each in range(3)], mode="edge")
        around = [lax.slice_in_dim(padded, at, at + flow.shape[axis], axis=axis) for at in range(5)]
        flow = jnp.median(jnp.stack(around), axis=0)
    return flow


def _halved(x: Float[Array, "h w"]) -> Float[Array, "h2 w2"]:
    return lax.reduce_window(x, 0.0, lax.add, (2, 2), (2, 2), "VALID") / 4


def _grid(flow: Flow) -> tuple[Array, Array]:
    rows, columns = jnp.meshgrid(jnp.arange(flow.shape[0]), jnp.arange(flow.shape[1]), indexing="ij")
    return rows + flow[..., 0], columns + flow[..., 1]


def _warped(x: Float[Array, "h w c"], flow: Flow) -> Float[Array, "h w c"]:
    """x where the flow leads, between pixels linearly."""
    take = partial(map_coordinates, coordinates=list(_grid(flow)), order=1, mode="nearest")
    return jax.vmap(take, in_axes=-1, out_axes=-1)(x)
