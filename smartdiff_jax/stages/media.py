"""Frames to a file, by the suffix of its name.

    .mp4         H.264, 4:2:0, BT.709, index first: plays everywhere. Odd sizes get their last column or row doubled,
                 because 4:2:0 has none; nothing is scaled or cut.
    .webp .png   animated if there are several frames (.png is lossless), else a still
    .gif         as .webp in 256 colours a frame
    .jpg .jpeg   one frame only

Pillow merges frames that do not differ from the one before and adds up their durations: the film is the same, the count
of stored frames is not. A file is written beside its place and renamed, so that a stop in the middle leaves nothing.
"""

import os
import secrets
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from smartdiff_jax.errors import InvalidRequest

X264 = {"crf": "17", "bf": "0"}
"""Visually lossless. No B-frames: with them the same frames came out as one of up to nine files, by what had been written
before (seen at sides of 32, 64 and 96, not of 128); and a job that is made again must end in the same bytes."""
BT709 = 1  # FFmpeg's number for it, alike in its enums of colour matrix, primaries and transfer curve


def check_output(path: str | Path, *, num_frames: int = 1, fps: int | float = 16.0) -> Path:
    """Raises InvalidRequest if `write_media` could not write there; ask before the frames are made. Changes nothing.

    Missing parent folders are no error, they will be made. An existing file will be overwritten.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in WRITERS:
        raise InvalidRequest("output", str(path), f"use one of {' '.join(WRITERS)}")
    if suffix in STILLS and num_frames > 1:
        raise InvalidRequest("output", str(path), f"{suffix} holds one picture, not {num_frames} frames; use .mp4")
    fastest = FASTEST.get(suffix, 1000)
    if not 0 < fps <= fastest:  # NaN is in no range
        raise InvalidRequest("fps", fps, f"give a number above 0 and up to {fastest} for {suffix}")
    folder = path.parent
    try:
        if path.is_dir():
            raise InvalidRequest("output", str(path), "it is a folder; name a file in it")
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def write_media(path: str | Path, frames: UInt8[np.ndarray, "frames height width 3"], fps: int | float) -> Path:
    """Writes RGB frames as a video, an animation or a picture; makes missing folders and returns the path.

    fps: frames a second. Raises InvalidRequest as `check_output` does, and when the disk is full.
    """
    path = check_output(path, num_frames=len(frames), fps=fps)
    partial = path.parent / f".smartdiff-{secrets.token_hex(8)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[path.suffix.lower()](partial, frames, fps)
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _unwritable(path: Path, error: OSError) -> InvalidRequest:
    return InvalidRequest("output", str(path), f"cannot be written ({error.strerror or error}); choose another place")


def _durations(num_frames: int, fps: int | float, tick: int) -> list[int]:
    """Milliseconds of each frame in whole ticks, spread so that no frame starts more than half a tick off its time."""
    starts = np.round(np.arange(num_frames + 1) * 1000 / (fps * tick)).astype(int) * tick
    return np.diff(starts).tolist()


def _write_mp4(file: Path, frames: np.ndarray, fps: int | float) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    _, height, width, _ = frames.shape
    odd = ((0, height % 2), (0, width % 2), (0, 0))
    with av.open(str(file), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=X264)
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        # said in the file, because players guess the matrix by the size of the picture
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = ColorRange.MPEG
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.pad(frame, odd, mode="edge"), "rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _write_webp(file: Path, frames: np.ndarray, fps: int | float) -> None:
    _write_pillow(file, frames, "WEBP", _durations(len(frames), fps, 1), quality=90)


def _write_png(file: Path, frames: np.ndarray, fps: int | float) -> None:
    _write_pillow(file, frames, "PNG", _durations(len(frames), fps, 1))


def _write_gif(file: Path, frames: np.ndarray, fps: int | float) -> None:
    _write_pillow(file, frames, "GIF", _durations(len(frames), fps, 10))


def _write_jpeg(file: Path, frames: np.ndarray, fps: int | float) -> None:
    _write_pillow(file, frames, "JPEG", [], quality=95, subsampling=0)


def _write_pillow(file: Path, frames: np.ndarray, kind: str, durations: list[int], **options: int) -> None:
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in frames)
    if rest:
        first.save(file, kind, save_all=True, append_images=rest, duration=durations, loop=0, **options)
    else:
        first.save(file, kind, **options)


WRITERS: dict[str, Callable[[Path, np.ndarray, int | float], None]] = {
    ".mp4": _write_mp4,
    ".webp": _write_webp,
    ".gif": _write_gif,
    ".png": _write_png,
    ".jpg": _write_jpeg,
    ".jpeg": _write_jpeg,
}
STILLS = {".jpg", ".jpeg"}
FASTEST = {".gif": 50}  # browsers slow a GIF down whose frames are shorter than 20 ms; the others count milliseconds
