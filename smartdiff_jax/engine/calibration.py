"""What a model's caches are told about it, measured on the model itself: recorded once, kept beside the weights.

The file holds numbers by policy, as `cache/data/*.json` does for published ones, which it replaces:

    auto        inner products of the velocities of full runs, which the planner plans by
    magcache    the growth of the residual, step by step
    teacache    the polynomial from the signal's distance to the residual's, with its R^2, and that distance step by step
    fbcache     the distances of what the first block adds, step by step
"""

import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smartdiff_jax.cache.published import published_numbers
from smartdiff_jax.cache.recorder import Signals
from smartdiff_jax.config.model import known_models
from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.weights.folder import CheckpointFolder

FILE = "cache.json"
DIGITS = 8
DEGREE = 4
PIECE = 1 << 20
MIN_STEPS = 4
"""Shorter runs say nothing about skipping."""
PROMPTS = (
    "a red fox walking through fresh snow between birch trees, seen from the side",
    "a woman in a yellow coat reading a newspaper in a crowded underground train",
    "waves breaking on black rocks at sunset, slow camera movement along the shore",
    "a bowl of fruit on a wooden table by a window, soft morning light, still life",
    "an old steam locomotive crossing an iron bridge over a valley in autumn",
    "a neon sign that says OPEN above the door of a small noodle shop, rain at night",
    "two children flying a kite on a green hill under fast clouds",
    "an astronaut floating above the earth, reflections of city lights in the visor",
)


def calibration_files(folder: CheckpointFolder, bundled: bool, cache_dir: Path, key: Callable[[], str]) -> list[Path]:
    """Where a model's calibration is looked for, the most wanted first, which is also where a new one goes.

    Beside the weights; for a folder that is not the user's (bundled, or downloaded), below `cache_dir`, by `key`.
    """
    own = folder.path / FILE
    borrowed = bundled or folder.path.absolute().is_relative_to((cache_dir / "hub").absolute())
    if not borrowed and os.access(folder.path, os.W_OK):
        return [own]
    return [cache_dir / "calibration" / f"{key()}.json", own]


def read_calibration(files: Sequence[Path]) -> dict[str, Any]:
    """The first file's numbers; none if there is no file. Raises CheckpointError for a damaged one."""
    for file in files:
        if not file.is_file():
            continue
        try:
            numbers = json.loads(file.read_text())
            if not isinstance(numbers, dict):
                raise ValueError("not an object")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: unreadable ({error}); remove it and run `smartdiff calibrate` again") from None
        return numbers
    return {}


def write_calibration(file: Path, numbers: dict[str, Any]) -> None:
    """Written beside its place and renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.parent / f".smartdiff-{secrets.token_hex(8)}.part"
    try:
        partial.write_text(_compact(numbers) + "\n")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Recording:
    """One full run. signals: of each branch, leaves [n, T, ..]. latents, velocities: [T, b, s, p]. sigmas: of the steps."""

    signals: Signals
    latents: np.ndarray
    velocities: np.ndarray
    sigmas: np.ndarray


def signal_of(family: str, known: dict[str, Any]) -> dict[str, Any]:
    """TeaCache's signal and its rows: the model's, or that of a published model of its family."""
    relatives = [published_numbers(spec.name) for spec in known_models().values() if spec.family == family]
    for numbers in (known, *relatives):
        if "signal" in numbers.get("teacache", {}):
            return {"signal": numbers["teacache"]["signal"], "rows": numbers["teacache"].get("rows", 1)}
    return {"signal": "modulated_input", "rows": 1}


def numbers_from(
    recordings: dict[int, list[Recording]], source: str, signal: dict[str, Any], known: dict[str, Any]
) -> dict[str, Any]:
    """Numbers by policy, from the recordings of several prompts by their number of steps.

    signal: TeaCache's. known: what is known already, of which the policies' parameters are kept. What goes by steps is taken
    of the longest runs.
    """
    longest = recordings[max(recordings)]
    signals = [recording.signals for recording in longest]
    ratios = np.mean([signal.magnitude for signal in signals], axis=0)
    ratios[:, 0] = 1.0
    moved, changes = (
        np.concatenate([getattr(signal, name)[:, 1:].ravel() for signal in signals]) for name in ("signal", "residual")
    )
    coefficients, r2 = fit(moved, changes)
    distances, from_first_block = (
        np.mean([getattr(signal, name) for signal in signals], axis=(0, 1)) for name in ("signal", "first_block")
    )
    kept = {name: {"params": known.get(name, {}).get("params", {})} for name in ("magcache", "teacache", "fbcache")}
    return {
        "auto": {
            "source": source,
            "runs": [summarise(runs) for _, runs in sorted(recordings.items())],
        },
        "magcache": kept["magcache"] | {"source": source, "ratios": _rounded(ratios, 5)},
        "teacache": kept["teacache"]
        | signal
        | {"source": source, "coefficients": [float(f"{c:.{DIGITS}g}") for c in coefficients], "r2": round(r2, 4)}
        | {"distances": _rounded(distances[None], 6)[0]},
        "fbcache": kept["fbcache"] | {"source": source, "distances": _rounded(from_first_block, 5)},
    }


def summarise(runs: Sequence[Recording]) -> dict[str, Any]:
    """`cache.auto.Recorded` of full runs."""
    gram = np.mean([inner_products(run.velocities) for run in runs], axis=0)
    return {
        "sigmas": [float(f"{sigma:.7g}") for sigma in runs[0].sigmas],
        "gram": [[float(f"{value:.{DIGITS}g}") for value in row[: index + 1]] for index, row in enumerate(gram)],
        "size": float(f"{np.sqrt(np.mean([np.sum(run.latents[0].astype(np.float64) ** 2) for run in runs])):.6g}"),
        "prompts": len(runs),
    }


def inner_products(velocities: np.ndarray) -> np.ndarray:
    """Of [T, ...] by the first axis, in float64, a piece at a time: neighbours differ in the last digits of float32."""
    flat = velocities.reshape(len(velocities), -1)
    gram = np.zeros((len(flat), len(flat)))
    for first in range(0, flat.shape[1], PIECE):
        piece = flat[:, first : first + PIECE].astype(np.float64)
        gram += piece @ piece.T
    return gram


def fit(distances: np.ndarray, changes: np.ndarray) -> tuple[np.ndarray, float]:
    """The polynomial of least squares, highest power first, and the share of the variance that it explains."""
    # A signal of the timestep alone takes as many values as there are steps, which may be too few for all powers.
    degree = min(DEGREE, len(np.unique(distances)) - 1)
    coefficients = np.polyfit(distances, changes, degree)
    left = np.sum((changes - np.polyval(coefficients, distances)) ** 2)
    return coefficients, float(1.0 - left / np.sum((changes - changes.mean()) ** 2))


def _rounded(table: np.ndarray, digits: int) -> list[list[float]]:
    return [[round(float(value), digits) for value in row] for row in table]


def _compact(value: Any, depth: int = 0) -> str:
    """JSON with one line for a row of numbers, so that it can be read and compared."""
    indent = "  " * (depth + 1)
    if isinstance(value, dict):
        items = [f"{indent}{json.dumps(key)}: {_compact(item, depth + 1)}" for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        items = [indent + _compact(item, depth + 1) for item in value]
    else:
        return json.dumps(value)
    ends = "{}" if isinstance(value, dict) else "[]"
    return f"{ends[0]}\n" + ",\n".join(items) + f"\n{'  ' * depth}{ends[1]}" if items else ends
