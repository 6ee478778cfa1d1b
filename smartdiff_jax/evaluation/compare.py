"""Folders of results against a reference, pair by pair: metrics with intervals, and a sheet to look at.

Results are paired by their names. Intervals are 95 %, by bootstrap over pairs: how far off the mean might be with others.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.evaluation.clip_score import ClipScore
from smartdiff_jax.evaluation.files import media_in, read_media
from smartdiff_jax.evaluation.flow import motion, warping_errors
from smartdiff_jax.evaluation.frechet import distances
from smartdiff_jax.evaluation.lpips import Lpips
from smartdiff_jax.evaluation.metrics import LEAST_SIDE, METRICS, Clip, flicker
from smartdiff_jax.evaluation.plot import Point, line_plot

RESAMPLES = 2000
LABEL, SIDE, MOST_ROWS = 16, 192, 24
"""Of a sheet, in pixels: the height of a label, the most of a picture's side; and how many pairs it shows."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over `count` pairs, and where it lies in 95 of 100 resamplings of them. Infinite where a pair is equal (PSNR)."""

    mean: float
    low: float
    high: float
    count: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """One folder against the reference: each pair's numbers by its name, their means, and distances of the folders."""

    place: str
    pairs: dict[str, dict[str, float]]
    means: dict[str, Interval]
    distances: dict[str, float]


def evaluate(
    reference: Path,
    others: Sequence[Path],
    on_pair: Callable[[str], object] = lambda name: None,
    networks: Sequence[Lpips] = (),
    warping: bool = False,
    clip: ClipScore | None = None,
) -> list[Setting]:
    """Every one of `others` against `reference`: folders, or single files. Raises InvalidRequest where names do not pair up.

    MS-SSIM is left out where a picture is too small for it. flicker is that of the other, flicker_change what it has more.
    networks: LPIPS by each. warping: of clips the warping error too, which takes seconds a frame on a CPU. clip: how well each
    goes with the prompt in its report, or in its reference's.
    seconds, and speed_up over the reference, are of results with a report beside them; distances of folders with features.
    """
    true = media_in(reference)
    found = [media_in(place) for place in others]
    for place, results in zip(others, found, strict=True):
        _check_names(reference, true, place, results)
    pairs: list[dict[str, dict[str, float]]] = [{} for _ in others]
    for name, path in true.items():
        true, took = read_media(path), report_of(path)
        flows = motion(true) if warping and len(true) > 1 else None
        for place, results, rows in zip(others, found, pairs, strict=True):
            on_pair(f"{place.name}: {name or place.name}")
            row = rows[name or place.stem] = _numbers(true, other := read_media(results[name]), results[name])
            row |= {f"lpips_{network.network}": network(true, other) for network in networks}
            row |= warping_errors(true, other, flows) if flows is not None else {}
            row |= _clip_scores(clip, (true, path), (other, results[name])) if clip is not None else {}
            row |= _speed(took, report_of(results[name]))
    return [
        Setting(str(place), rows, _means(rows), distances(reference, place)) for place, rows in zip(others, pairs, strict=True)
    ]


def report_of(result: Path) -> dict[str, Any] | None:
    """The report beside a result (`generate --report`), None where there is none. Raises InvalidRequest for another JSON."""
    file = result.with_suffix(".json")
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
        return {"seconds": float(sum(found["seconds"].values())), "prompt": str(found["params"]["prompt"])}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InvalidRequest("report", str(file), "is no report of `generate --report`; move it elsewhere") from None


def _clip_scores(clip: ClipScore, true: tuple[Clip, Path], other: tuple[Clip, Path]) -> dict[str, float]:
    told = report_of(other[1]) or report_of(true[1])
    if told is None:
        raise InvalidRequest("clip", str(other[1]), "no report tells its prompt; write it with `generate --report NAME.json`")
    score = clip(other[0], told["prompt"])
    return {"clip_score": score, "clip_score_change": score - clip(true[0], told["prompt"])}


def _speed(reference: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, float]:
    if other is None:
        return {}
    speed_up = {} if reference is None else {"speed_up": reference["seconds"] / other["seconds"]}
    return {"seconds": other["seconds"]} | speed_up


def speed_quality_plot(file: Path, reference: Path, settings: Sequence[Setting], metric: str) -> None:
    """A point a folder: seconds a result, and its likeness to the reference's, with the interval. Raises InvalidRequest."""
    points: dict[str, Sequence[Point]] = {}
    for setting in settings:
        quality, seconds = setting.means.get(metric), setting.means.get("seconds")
        if quality is None or not np.isfinite(quality.mean):
            told = ", ".join(name for name, one in setting.means.items() if np.isfinite(one.mean))
            raise InvalidRequest("plot_metric", metric, f"{setting.place} has no finite one; choose one of {told}")
        if seconds is None or seconds.count < len(setting.pairs):
            told = "holds results without a report beside them; write each with `generate -o NAME.mp4 --report NAME.json`"
            raise InvalidRequest("plot", setting.place, told)
        points[Path(setting.place).name] = [(seconds.mean, quality.mean, quality.low, quality.high)]
    title = f"Against {reference.name}: {metric} and seconds a result"
    line_plot(file, points, title, "seconds a result, all stages", metric)


def _check_names(reference: Path, true: dict[str, Path], place: Path, found: dict[str, Path]) -> None:
    if missing := sorted(true.keys() ^ found.keys()):
        few = ", ".join(name or "(a single file)" for name in missing[:5]) + (", …" if len(missing) > 5 else "")
        remedy = f"{len(missing)} results are in only one of it and {reference}: {few}; give each the same names"
        raise InvalidRequest("results", str(place), remedy)


def _numbers(true: Clip, other: Clip, path: Path) -> dict[str, float]:
    if true.shape != other.shape:
        sizes = [f"{len(clip)} frames of {clip.shape[2]}x{clip.shape[1]}" for clip in (other, true)]
        raise InvalidRequest("results", str(path), f"has {sizes[0]}, its reference {sizes[1]}; they must be the same")
    served = [name for name in METRICS if name != "ms_ssim" or min(true.shape[1:3]) >= LEAST_SIDE]
    row = {name: METRICS[name](true, other) for name in served}
    if len(true) > 1:
        row["flicker"] = flicker(other)
        row["flicker_change"] = row["flicker"] - flicker(true)
    return row


def _means(pairs: dict[str, dict[str, float]]) -> dict[str, Interval]:
    names = list(dict.fromkeys(name for row in pairs.values() for name in row))
    found = {}
    for name in names:
        values = np.array([row[name] for row in pairs.values() if name in row])
        picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
        low, high = np.quantile(values[picks].mean(axis=1), (0.025, 0.975)) if np.isfinite(values).all() else (np.inf,) * 2
        found[name] = Interval(float(values.mean()), float(low), float(high), len(values))
    return found


def contact_sheet(reference: Path, others: Sequence[Path]) -> UInt8[np.ndarray, "h w 3"]:
    """A row a result, the first MOST_ROWS by name: the reference's middle frame, then every other's, each labelled."""
    columns = [media_in(place) for place in (reference, *others)]
    names = sorted(columns[0])[:MOST_ROWS]
    cells = [[_middle(column[name]) for column in columns] for name in names]
    width = max(cell.width for row in cells for cell in row)
    height = max(cell.height for row in cells for cell in row) + LABEL
    sheet = Image.new("RGB", (width * len(columns), LABEL + height * len(names)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, place in enumerate((reference, *others)):
        draw.text((x * width + 2, 2), place.name, fill="black")
    for y, (name, row) in enumerate(zip(names, cells, strict=True)):
        draw.text((2, LABEL + y * height + 2), name, fill="black")
        for x, cell in enumerate(row):
            sheet.paste(cell, (x * width, 2 * LABEL + y * height))
    return np.asarray(sheet)


def _middle(path: Path) -> Image.Image:
    frames = read_media(path)
    picture = Image.fromarray(frames[len(frames) // 2])
    picture.thumbnail((SIDE, SIDE))
    return picture
