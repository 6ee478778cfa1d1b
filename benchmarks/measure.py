"""What every benchmark needs: timing, a stamp that says what was measured on what, and the file it goes to.

JAX is imported only where it is used, so that a benchmark that starts its measurements as processes of their own does not
hold the device itself.
"""

import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IN_A_ROW = 0.5
"""Seconds of calls that are waited for together where a peer's are: about a chunk of the service's steps."""

LINE = 240
"""Characters of a line of a result file, unless one list of figures is longer."""

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
)


def time_call(fn: Callable, *args, warmup: int = 2, repeats: int = 7) -> dict[str, float]:
    """Median, least and most seconds of fn(*args), each call waited for, after `warmup` calls that are not counted."""
    import jax

    for _ in range(warmup):
        jax.block_until_ready(fn(*args))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - began)
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def time_calls(fn: Callable, *args, seconds: float = 0.05, repeats: int = 7) -> dict[str, float]:
    """Like `time_call`, of calls in a row that are waited for together: for kernels that are shorter than their start."""

    once = time_call(fn, *args, repeats=3)["median"]
    calls = max(1, min(500, round(seconds / once)))

    def in_a_row(*args):
        for _ in range(calls - 1):
            fn(*args)  # not kept: to make room for hundreds of results takes longer than many a kernel
        return fn(*args)

    found = time_call(in_a_row, *args, warmup=1, repeats=repeats)
    return {name: value / calls for name, value in found.items()} | {"calls": calls}


def stamp(commit: str | None = None) -> dict:
    """Device, versions, commit and time. `commit` is for a copy of the tree without its history."""
    import jax

    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else f"cpu {platform.machine()}",
        "device_count": jax.device_count(),
        "platform": device.platform,
        "versions": {"python": platform.python_version()} | _versions(),
        "commit": commit or _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def child(command: list[str], python: str = sys.executable) -> dict:
    """The last line that a Python process of its own prints, as JSON, or why there is none."""
    done = subprocess.run([python, *command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return {"error": (done.stderr or done.stdout)[-2000:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def write(name: str, results: dict, file: Path | None = None) -> Path:
    """Writes results, which hold a "stamp", to `file` or benchmarks/results/<name>-<device>.json, and says where that is."""
    path = file or result_file(name, results["stamp"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(laid_out({"benchmark": name} | results) + "\n")
    return path


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows whose names are told once: columns in the order they first come, None where a row has none."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return {"columns": columns, "rows": [[row.get(name) for name in columns] for row in rows]}


def laid_out(value: Any, indent: str = "") -> str:
    """JSON with one line for what fits into it, or holds nothing nested: rows one can read, in half the space."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    flat = json.dumps(value)
    if len(indent + flat) <= LINE or not any(isinstance(part, dict | list | tuple) for part in inner):
        return flat
    deeper = indent + " "
    if isinstance(value, dict):
        parts, ends = [f"{json.dumps(str(key))}: {laid_out(part, deeper)}" for key, part in value.items()], "{}"
    else:
        parts, ends = [laid_out(part, deeper) for part in value], "[]"
    return f"{ends[0]}\n{deeper}" + f",\n{deeper}".join(parts) + f"\n{indent}{ends[1]}"


def result_file(name: str, stamp: dict) -> Path:
    """Where results of that name and stamp go."""
    device = re.sub(r"[^a-z0-9]+", "-", stamp["device"].lower()).strip("-")
    return RESULTS / f"{name}-{device}.json"


def _versions() -> dict[str, str]:
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def _commit() -> str | None:
    """The commit, marked where files differ from it; None where there is no history."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
