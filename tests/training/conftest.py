"""A tiny atlas drawn by the tests themselves: the real one is made from downloads and never in git."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from smartdiff_jax.training.data.atlas import CLIP_FRAMES, SIDE, STYLES, Atlas, premultiply

SHAPES = {
    "arrow": [(4, 28), (40, 28), (40, 8), (68, 36), (40, 64), (40, 44), (4, 44)],
    "boot": [(10, 4), (34, 4), (34, 44), (66, 52), (66, 66), (10, 66)],
    "flag": [(8, 4), (66, 16), (20, 34), (20, 68), (8, 68)],
    "house": [(36, 4), (68, 34), (58, 34), (58, 68), (14, 68), (14, 34), (4, 34)],
    "kite": [(36, 4), (58, 26), (36, 68), (14, 26)],
    "bolt": [(40, 4), (12, 40), (32, 40), (24, 68), (60, 28), (38, 28)],
    "fish": [(4, 18), (20, 30), (44, 14), (68, 36), (44, 58), (20, 42), (4, 54)],
    "steps": [(4, 68), (4, 52), (24, 52), (24, 34), (44, 34), (44, 14), (68, 14), (68, 68)],
}
PAINTS = [(230, 190, 40), (40, 140, 220), (90, 60, 40), (240, 240, 240), (30, 150, 90), (200, 60, 160)]


def draw(points, body, mark, turn=0.0, grow=1.0):
    """A two-coloured shape, straight-alpha RGBA [72, 72, 4], drawn four times as large and reduced."""
    big = Image.new("RGBA", (4 * SIDE, 4 * SIDE))
    pen = ImageDraw.Draw(big)
    pen.polygon([(4 * x, 4 * y) for x, y in points], fill=(*body, 255))
    x, y = np.mean(points, 0)
    pen.ellipse([4 * (x - 9 * grow), 4 * (y - 9 * grow), 4 * (x + 9 * grow), 4 * (y + 9 * grow)], fill=(*mark, 255))
    small = big.rotate(turn, Image.Resampling.BICUBIC).convert("RGBa").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small.convert("RGBA"))


@pytest.fixture(scope="session")
def drawn_atlas() -> Atlas:
    """16 subjects in three styles; every other one has a clip whose mark swells and whose body nods."""
    names, sprites, clips, clip_index = [], [], [], []
    for row in range(16):
        shape = list(SHAPES)[row % 8]
        body, mark = PAINTS[row % 6], PAINTS[(row + 2 + row // 8) % 6]
        names.append(shape if row < 8 else f"other {shape}")
        styles = [(body, mark), (mark, body), (tuple(255 - c for c in body), mark)]
        sprites += [premultiply(draw(SHAPES[shape], *style)) for style in styles]
        clip_index.append(len(clips) if row % 2 else -1)
        if row % 2:
            phase = np.sin(2 * np.pi * np.arange(CLIP_FRAMES) / CLIP_FRAMES)
            clips.append([premultiply(draw(SHAPES[shape], body, mark, 9 * p, 1 + 0.7 * p)) for p in phase])
    return Atlas(
        names=tuple(names),
        synonyms=tuple((f"{name} thing",) for name in names),
        groups=("Objects",) * 16,
        sprites=np.stack(sprites),
        clips=np.array(clips, np.uint8),
        sprite_index=np.arange(16 * len(STYLES), dtype=np.int32).reshape(16, len(STYLES)),
        clip_index=np.array(clip_index, np.int32),
    )
