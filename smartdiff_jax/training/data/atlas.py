"""The atlas: every sprite and every animated clip of the training world in one small file.

The world is closed: "things" (animals, food, travel, activities, objects), hands and body parts, and the faces that the Fluent
animated pack animates. `world.json` beside this file says which hands and faces, what a person would call a subject
("automobile" is a car), and its synonyms. A subject exists in up to three styles: `3d` (Fluent 3-D), `flat` (Fluent flat) and
`noto` (Noto, another drawing). A clip is one loop of the Fluent animated pack, resampled to 17 frames.

Everything is cropped to what is drawn and fitted into a square (72 pixels for video) with a 2-pixel border, so a sprite's side
is the subject's longest side. The file keeps straight-alpha WebP bytes (about 16 MB); `load` decodes them to premultiplied
RGBA, which is what a correct bilinear blend needs. An atlas for pictures has larger sprites of the same subjects, and no clips.
"""

import io
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.training.data import sources

SIDE = 72
BORDER = 2
CLIP_FRAMES = 17
STYLES = ("3d", "flat", "noto")
THINGS = frozenset({"Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects"})
FACES = "Smileys & Emotion"
FORMAT = 1
LEAST_MOTION = 0.024  # mean absolute change of a clip over the pixels it covers, in [0, 1], below which it looks still


@dataclass(frozen=True)
class Atlas:
    """The decoded world. Indices into `names` are subjects; -1 in an index table means "does not exist"."""

    names: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]
    sprites: UInt8[np.ndarray, "sprites side side 4"]
    clips: UInt8[np.ndarray, "clips frames side side 4"]
    sprite_index: Int[np.ndarray, "subjects styles"]
    clip_index: Int[np.ndarray, " subjects"]

    @property
    def animated(self) -> Bool[np.ndarray, " subjects"]:
        """Which subjects have a clip of their own."""
        return self.clip_index >= 0

    def subject(self, name: str) -> int:
        """The index of a subject's name; `InvalidConfig` names the value if there is none."""
        if name not in self.names:
            raise InvalidConfig("subject", name, "not in this atlas")
        return self.names.index(name)

    def bank(self) -> UInt8[np.ndarray, "images side side 4"]:
        """Sprites, then the frames of all clips: the one array that `scenes.render` samples from."""
        return np.concatenate([self.sprites, self.clips.reshape(-1, *self.sprites.shape[1:])])


def world() -> dict:
    """The committed choice of subjects, short names and synonyms."""
    return json.loads(resources.files("smartdiff_jax.training.data").joinpath("world.json").read_text())


def premultiply(straight: UInt8[np.ndarray, "*n 4"]) -> UInt8[np.ndarray, "*n 4"]:
    """Straight alpha to premultiplied alpha, rounded."""
    alpha = straight[..., 3:].astype(np.uint16)
    colour = (straight[..., :3].astype(np.uint16) * alpha + 127) // 255
    return np.concatenate([colour.astype(np.uint8), straight[..., 3:]], -1)


def fit(frames: Sequence[Image.Image], side: int = SIDE, border: int = BORDER) -> list[Image.Image]:
    """Crops RGBA frames to the box that any of them draws in, and centres it in side x side pixels, longest side filled."""
    alphas = [frame.getchannel("A").point([255 * (a > 8) for a in range(256)]) for frame in frames]
    boxes = [box for alpha in alphas if (box := alpha.getbbox())]
    left, top = min(b[0] for b in boxes), min(b[1] for b in boxes)
    right, bottom = max(b[2] for b in boxes), max(b[3] for b in boxes)
    zoom = (side - 2 * border) / max(right - left, bottom - top)
    width, height = max(1, round((right - left) * zoom)), max(1, round((bottom - top) * zoom))
    fitted = []
    for frame in frames:
        # Pillow's RGBa is premultiplied: resizing there leaves no dark or light fringe.
        small = frame.crop((left, top, right, bottom)).convert("RGBa").resize((width, height), Image.Resampling.HAMMING)
        canvas = Image.new("RGBA", (side, side))
        canvas.paste(small.convert("RGBA"), ((side - width) // 2, (side - height) // 2))
        fitted.append(canvas)
    return fitted


def encode(image: Image.Image, quality: int) -> bytes:
    """WebP, lossless where that is hardly larger (flat drawings), else lossy with exact alpha."""
    lossy, lossless = io.BytesIO(), io.BytesIO()
    image.save(lossy, "WEBP", quality=quality, method=5)
    image.save(lossless, "WEBP", lossless=True, quality=60, method=3)
    return min((lossless, lossy), key=lambda out: out.tell() / (1.25 if out is lossless else 1)).getvalue()


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def _svg_renderer(package_icons: dict) -> Callable[[str], Image.Image]:
    import resvg_py  # needed to build the atlas only

    icons = package_icons["icons"]

    def draw(slug: str) -> Image.Image:
        icon = icons[slug]
        width = icon.get("width", package_icons.get("width", 16))
        height = icon.get("height", package_icons.get("height", 16))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        return _open(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256))).convert("RGBA")

    return draw


def read_clip(content: bytes, frames: int = CLIP_FRAMES) -> list[Image.Image] | None:
    """`frames` evenly spaced RGBA frames of an animated WebP's one loop; None if it is a still picture."""
    image = _open(content)
    count = getattr(image, "n_frames", 1)
    if count < 2:
        return None
    wanted = [round(i * count / frames) for i in range(frames)]
    decoded = {}
    for index in sorted(set(wanted)):
        image.seek(index)
        decoded[index] = image.convert("RGBA")
    return [decoded[index] for index in wanted]


def motion_of(frames: Sequence[Image.Image]) -> float:
    """How much a clip moves: the largest mean change against its first frame, over the pixels it ever covers."""
    stack = np.stack([premultiply(np.asarray(frame)) for frame in frames]).astype(np.float32) / 255
    stack = stack.reshape(len(stack), SIDE // 4, 4, SIDE // 4, 4, 4).mean((2, 4))
    covered = max(float((stack[..., 3].max(0) > 0.1).mean()), 1e-6)
    return float(np.abs(stack - stack[0]).mean((1, 2, 3)).max()) / covered


def choose(everything: Iterable[sources.Subject], animated: Callable[[sources.Subject], bool]) -> list[sources.Subject]:
    """The subjects of the world: things but the 24 clock faces, the listed body parts, the animated and not left-out faces."""
    lists = world()
    body_parts, left_out = set(lists["body_parts"]), set(lists["faces_left_out"])

    def belongs(subject: sources.Subject) -> bool:
        if subject.group in THINGS:
            return not ("o’clock" in subject.name or subject.name.endswith("-thirty"))
        if subject.group == FACES:
            return subject.name not in left_out and animated(subject)
        return subject.name in body_parts

    return [subject for subject in everything if belongs(subject)]


def build(cache_dir: Path, output: Path, side: int = SIDE, animated: bool = True) -> Path:
    """Fetches the pinned packages into `cache_dir` and writes the atlas to `output` (two minutes).

    side: of a sprite, in pixels, a multiple of 3. animated: keep the clips, which have a side of SIDE always; they are looked
    at in any case, because they decide which faces belong to the world.
    """
    if side % 3 or side <= 2 * BORDER:
        raise InvalidConfig("atlas.side", side, "must be a multiple of 3, and more than the border")
    if animated and side != SIDE:
        raise InvalidConfig("atlas.side", side, f"clips are {SIDE} pixels wide, and so must the sprites beside them be")
    tarballs = sources.fetch(cache_dir)
    everything = {subject.code_points: subject for subject in sources.subjects(tarballs)}
    clips: dict[str, bytes] = {}
    for package in sources.FLUENT_ANIMATED:
        for path, content in sources.members(tarballs[package], ".webp"):
            subject = everything.get(Path(path).stem)
            if subject is None or subject not in choose([subject], lambda _: True):
                continue
            frames = read_clip(content)
            if frames is None:
                continue
            fitted = fit(frames)
            if motion_of(fitted) < LEAST_MOTION:
                continue
            strip = Image.new("RGBA", (SIDE, SIDE * CLIP_FRAMES))
            for index, frame in enumerate(fitted):
                strip.paste(frame, (0, SIDE * index))
            clips[subject.code_points] = encode(strip, 85)

    chosen = choose(everything.values(), lambda subject: subject.code_points in clips)
    flat = sources.read_json(tarballs[sources.FLUENT_FLAT], "icons.json")
    noto = sources.read_json(tarballs[sources.NOTO], "icons.json")
    draw_flat, draw_noto = _svg_renderer(flat), _svg_renderer(noto)
    wanted = {subject.code_points for subject in chosen}
    raster = {
        Path(path).stem: _open(content).convert("RGBA")
        for path, content in sources.members(tarballs[sources.FLUENT_3D], ".webp")
        if Path(path).stem in wanted
    }
    sprite_bytes: list[bytes] = []
    sprite_index = np.full((len(chosen), len(STYLES)), -1, np.int32)
    for row, subject in enumerate(chosen):
        drawings = [raster[subject.code_points], draw_flat(subject.slug)]
        if subject.slug in noto["icons"]:
            drawings.append(draw_noto(subject.slug))
        for style, drawing in enumerate(drawings):
            sprite_index[row, style] = len(sprite_bytes)
            sprite_bytes.append(encode(fit([drawing], side)[0], 90))

    clip_index = np.full(len(chosen), -1, np.int32)
    clip_bytes: list[bytes] = []
    for row, subject in enumerate(chosen):
        if animated and subject.code_points in clips:
            clip_index[row] = len(clip_bytes)
            clip_bytes.append(clips[subject.code_points])
    save(output, chosen, sprite_bytes, clip_bytes, sprite_index, clip_index, side)
    return output


def save(
    output: Path,
    chosen: Sequence[sources.Subject],
    sprite_bytes: Sequence[bytes],
    clip_bytes: Sequence[bytes],
    sprite_index: Int[np.ndarray, "subjects styles"],
    clip_index: Int[np.ndarray, " subjects"],
    side: int = SIDE,
) -> None:
    """Writes the encoded atlas; the names are shortened and given their synonyms here."""
    lists = world()
    names = [lists["short"].get(subject.name, subject.name).lower().replace("’", "'") for subject in chosen]
    meta = {
        "format": FORMAT,
        "side": side,
        "frames": CLIP_FRAMES,
        "names": names,
        "groups": [subject.group for subject in chosen],
        "synonyms": [lists["synonyms"].get(subject.name, []) for subject in chosen],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as file:
        np.savez(
            file,
            meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
            sprites=np.frombuffer(b"".join(sprite_bytes), np.uint8),
            sprite_ends=np.cumsum([len(b) for b in sprite_bytes], dtype=np.int64),
            clips=np.frombuffer(b"".join(clip_bytes), np.uint8),
            clip_ends=np.cumsum([len(b) for b in clip_bytes], dtype=np.int64),
            sprite_index=sprite_index,
            clip_index=clip_index,
        )


def _decode(blob: UInt8[np.ndarray, " n"], ends: Int[np.ndarray, " k"]) -> list[UInt8[np.ndarray, "h w 4"]]:
    starts = np.concatenate([[0], ends])[:-1].astype(np.int64)
    pieces = [blob[start:end].tobytes() for start, end in zip(starts, ends, strict=True)]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda piece: premultiply(np.asarray(_open(piece).convert("RGBA"))), pieces))


def load(path: Path) -> Atlas:
    """Reads and decodes an atlas (a few seconds); `InvalidConfig` if the file is of another format."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(arrays["meta"].tobytes())
    if meta["format"] != FORMAT:
        raise InvalidConfig(
            str(path), meta["format"], f"this version reads format {FORMAT}; run `smartdiff train --stage prepare`"
        )
    side, frames = meta["side"], meta["frames"]
    sprites = _decode(arrays["sprites"], arrays["sprite_ends"])
    clips = _decode(arrays["clips"], arrays["clip_ends"])
    return Atlas(
        names=tuple(meta["names"]),
        synonyms=tuple(tuple(words) for words in meta["synonyms"]),
        groups=tuple(meta["groups"]),
        sprites=np.stack(sprites) if sprites else np.zeros((0, side, side, 4), np.uint8),
        clips=np.stack(clips).reshape(-1, frames, side, side, 4) if clips else np.zeros((0, frames, side, side, 4), np.uint8),
        sprite_index=arrays["sprite_index"],
        clip_index=arrays["clip_index"],
    )
