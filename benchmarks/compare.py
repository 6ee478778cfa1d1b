"""Two results of one benchmark side by side: every timing, its ratio, and where the second is slower.

    smartdiff bench --compare before.json after.json

A timing is `{"median", "min", "max"}` in seconds. The second is slower, a regression, where its median is above the first's by
more than both lower halves of the spread together, (median - min) of the one and of the other, and by more than FLOOR of
the first's median. What disturbs a measurement only ever adds to it, so the upper halves, where outliers are, do not count;
FLOOR is what the same program differs by on another card of the same kind, or on the same card when it is warm. Faster is
the same rule turned round. Seconds that were measured once, or are told without a least, have no spread: they are shown and
not judged. Peers, and products of plain matrices, are shown too: where they are slower as well, the machine is.

Files can be compared if they hold the same benchmark, its settings are equal, and the device is. Otherwise InvalidRequest.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smartdiff_jax.errors import InvalidRequest

FLOOR = 0.03
PEERS = ("diffusers", "transformers", "peers", "product")
SETTINGS = ("benchmark", "model", "shape", "size", "problem", "dtype", "steps", "latents", "grid", "tokens", "chunk", "devices")
"""What a benchmark was asked to measure, wherever in a file it stands: other numbers are other work."""

OF_THE_MACHINE = ("device", "device_count", "platform")
SKIPPED = ("stamp", "versions", "params", *SETTINGS)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds by median and least; None where there was one measurement, or only quantiles are told."""

    median: float
    least: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """A timing that both files hold. verdict: "slower", "faster", "" within the spread, "no spread", or "peer"."""

    name: str
    before: float
    after: float
    verdict: str

    @property
    def ratio(self) -> float:
        return self.after / self.before


@dataclasses.dataclass(frozen=True)
class Comparison:
    """missing, new: names of timings that only the first file has, and only the second."""

    rows: list[Row]
    missing: list[str]
    new: list[str]

    @property
    def slower(self) -> list[Row]:
        return [row for row in self.rows if row.verdict == "slower"]


def compare(before: Path, after: Path) -> Comparison:
    """Raises InvalidRequest for files that are no results, or not of the same benchmark and device."""
    first, second = read(before), read(after)
    for name in OF_THE_MACHINE:
        if (told := second["stamp"].get(name)) != (was := first["stamp"].get(name)):
            raise InvalidRequest("compare", str(after), f"{name} is {told!r}, that of {before} {was!r}; measure both on one")
    ours, theirs = (dict(_settings(found)) for found in (first, second))
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            told = f"{name} is {theirs[name]!r}, that of {before} {ours[name]!r}; measure both with the same"
            raise InvalidRequest("compare", str(after), told)
    old, new = (dict(_timings(found)) for found in (first, second))
    shared = [name for name in old if name in new]
    if not shared:
        raise InvalidRequest("compare", str(after), f"shares no timing with {before}; give two results of one benchmark")
    rows = [Row(name, old[name].median, new[name].median, _verdict(name, old[name], new[name])) for name in shared]
    return Comparison(rows, [name for name in old if name not in new], [name for name in new if name not in old])


def _verdict(name: str, before: Timing, after: Timing) -> str:
    if any(part in PEERS for part in name.split("/")):
        return "peer"
    if before.least is None or after.least is None:
        return "no spread"
    noise = before.median - before.least + after.median - after.least
    if abs(after.median - before.median) <= max(noise, FLOOR * before.median):
        return ""
    return "slower" if after.median > before.median else "faster"


def read(file: Path) -> dict[str, Any]:
    """A result file. Raises InvalidRequest."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest("compare", str(file), f"cannot be read ({error}); give a file of benchmarks/results") from None
    if not isinstance(found, dict) or not isinstance(found.get("stamp"), dict):
        raise InvalidRequest("compare", str(file), "is no result of a benchmark: it has no stamp")
    return found


def _branches(value: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """(key, path, value) of what a value holds. Rows of a list go by what they call themselves, so that order is no matter."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, f"{path}/{key}" if path else key, item
    elif isinstance(value, list):
        for index, item in enumerate(value):
            words = [str(item[name]) for name in ("name", "ratio") if name in item] if isinstance(item, dict) else []
            yield "", f"{path}/{' '.join(words) or index}", item


def _timings(value: Any, path: str = "") -> Iterator[tuple[str, Timing]]:
    for key, where, item in _branches(value, path):
        if key in SKIPPED or key.startswith("predicted"):
            continue
        if isinstance(item, dict) and _is_number(item.get("median")):
            yield where, Timing(item["median"], item.get("min"))
        elif _is_number(item) and (key == "seconds" or key.endswith(("_s", "_seconds"))):
            yield where, Timing(item, None)
        else:
            yield from _timings(item, where)


def _settings(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, where, item in _branches(value, path):
        if key in SETTINGS:
            yield where, item
        elif key not in SKIPPED:
            yield from _settings(item, where)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
