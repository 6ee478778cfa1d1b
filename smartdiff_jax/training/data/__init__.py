"""The training data of the pocket models: an atlas of emoji, captions, and a renderer of moving scenes.

`sources` pins and fetches the packages, `atlas` packs them into one file, `captions` says what a scene shows, `scenes` draws
it on the device. The data is never committed; `prepare` makes it.
"""

from pathlib import Path

from smartdiff_jax.training.data import atlas


def prepare(cache_dir: Path, output: Path, side: int = atlas.SIDE, animated: bool = True) -> Path:
    """Fetches the pinned packages into `cache_dir` (about 770 MB) and builds the atlas file `output`; returns its path."""
    return atlas.build(cache_dir, output, side, animated)
