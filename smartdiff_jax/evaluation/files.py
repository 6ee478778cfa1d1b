"""Results back from files: what `stages/media.py` writes, as frames."""

from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8
from PIL import Image, ImageSequence, UnidentifiedImageError

from smartdiff_jax.errors import InvalidRequest

VIDEOS = (".mp4", ".webm", ".mov", ".mkv")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def read_media(path: Path) -> UInt8[np.ndarray, "f h w 3"]:
    """The frames of a video, an animation or a picture. Raises InvalidRequest for a file that is none."""
    try:
        if path.suffix.lower() in VIDEOS:
            with av.open(str(path)) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        else:
            with Image.open(path) as image:
                frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    except (FFmpegError, UnidentifiedImageError, OSError, IndexError) as error:
        raise InvalidRequest("file", str(path), f"cannot be read as a picture or a video ({error})") from error
    if not frames:
        raise InvalidRequest("file", str(path), "holds no frames")
    return np.stack(frames)


def media_in(place: Path) -> dict[str, Path]:
    """The results in a folder by their names without suffix; of a file itself, under the name "".

    Raises InvalidRequest where there is nothing, or two of one name.
    """
    if place.is_file():
        return {"": place}
    if not place.is_dir():
        raise InvalidRequest("results", str(place), "there is no such file or folder")
    found: dict[str, Path] = {}
    for path in sorted(place.iterdir()):
        if path.suffix.lower() not in VIDEOS + PICTURES:
            continue
        if path.stem in found:
            raise InvalidRequest("results", str(path), f"{found[path.stem].name} has the same name; keep one of them")
        found[path.stem] = path
    if not found:
        raise InvalidRequest("results", str(place), f"holds no {' '.join(VIDEOS + PICTURES)}")
    return found
