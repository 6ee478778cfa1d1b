"""Where the device's time goes: a trace, its kernels with the scopes they were written in, and the largest costs.

A kernel's scope is the path of `jax.named_scope`s around what it computes (denoise/model/block/self_attention/attention).
JAX's traces name the operation only; its scope is read from the compiled programs in memory. A program that was kept on disk
by an earlier version has the scopes of that version.
"""

import dataclasses
import gzip
import json
import re
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from smartdiff_jax.errors import InvalidRequest

T = TypeVar("T")
SUFFIX = ".json.gz"
KINDS = {
    "messages": ("nccl",),
    "attention": ("sdpa", "fmha", "flash"),
    "convolutions": ("fprop", "convolution", "conv2d", "conv3d"),
    "matmuls": ("nvjet", "gemm", "cutlass"),
    "memcpy, memset": ("memcpy", "memset"),
}
"""Kernels by words in their names, the first that fits; the others are what XLA fused."""

PRIMITIVES = {"dot_general": "matmuls", "conv_general_dilated": "convolutions"}
"""Kernels without such words, by what they end with."""

CONTROL = re.compile(r"(while|conditional|call)([.\d]*|_.*)$")
STRUCTURE = re.compile(r"(while|body|cond|closed_call|eval_jaxpr|checkpoint|shard_map|.*\(.*\)|.*->.*|branch_\d+_fun)$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{[^}]*op_name=\"([^\"]*)\"", re.MULTILINE)

Written = Mapping[tuple[str, str], tuple[str, ...]]
"""(program, operation) to the scopes around it, the outermost first, and its primitive."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One run of an operation on a device, in nanoseconds from the start of the trace."""

    device: str
    name: str
    kind: str
    scope: tuple[str, ...]
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclasses.dataclass(frozen=True)
class Cost:
    """All kernels of one kind in one scope. share: of the time of all kernels."""

    scope: str
    kind: str
    calls: int
    seconds: float
    share: float


def check_profile(path: Path) -> None:
    """Raises InvalidRequest unless a trace can be written there; ask before anything is loaded."""
    if not path.name.endswith(SUFFIX):
        raise InvalidRequest("profile", str(path), f"must end in {SUFFIX}, which Perfetto opens")
    folder = path.parent
    try:
        if path.is_dir():
            raise InvalidRequest("profile", str(path), "it is a folder; name a file in it")
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidRequest("profile", str(path), f"cannot be written ({error.strerror}); choose another place") from None


def options() -> Any:
    """For `jax.profiler.trace`: what devices do, without what Python does."""
    found = jax.profiler.ProfileOptions()
    # A CPU is its own device, whose operations are of the second level.
    found.python_tracer_level, found.host_tracer_level = 0, 2 if jax.default_backend() == "cpu" else 1
    return found


def keep_scopes() -> None:
    """Before a model is loaded: no program is taken from the disk whose scopes are of another version of the code."""
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)


def profiled(run: Callable[[], T], path: Path) -> tuple[T, list[Cost]]:
    """What `run()` gives and its largest costs; its trace is written to `path`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with jax.profiler.trace(folder, profiler_options=options()):
            result = run()
        kernels = kernels_of(folder, written_in_memory())
        write_trace(folder, kernels, path)
    return result, largest_costs(kernels)


def kernels_of(folder: Path, written: Written | None = None) -> list[Kernel]:
    """Every kernel in a trace, by the time it began. written: see `written_in_memory`; without, kernels have no scopes."""
    file = next(folder.rglob("*.xplane.pb"))
    found = []
    with warnings.catch_warnings():
        # JAX's own type for what is told of an event is made when it is first looked at, and warns; as an error it would abort.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            on_gpu = plane.name.startswith("/device:GPU")
            if on_gpu or plane.name == "/host:CPU":
                device = plane.name.removeprefix("/device:") if on_gpu else "CPU"
                # A GPU's other lines are sums of its streams.
                lines = [line for line in plane.lines if not on_gpu or line.name.startswith("Stream")]
                found += [_kernel(device, event, written or {}) for line in lines for event in line.events]
    return sorted((kernel for kernel in found if kernel is not None), key=lambda kernel: kernel.start)


def _kernel(device: str, event: Any, written: Written) -> Kernel | None:
    """None for what is no kernel: on a CPU, whatever is no operation or only runs others."""
    stats = dict(event.stats)
    operation = str(stats.get("hlo_op", ""))
    if device == "CPU" and (not operation or CONTROL.match(operation)):
        return None
    *scope, primitive = _path(written, (str(stats.get("hlo_module", "")), operation), event.name)
    return Kernel(device, event.name, _kind(event.name, primitive, scope), tuple(scope), event.start_ns, event.duration_ns)


def _path(written: Written, operation: tuple[str, str], kernel: str) -> tuple[str, ...]:
    """By the operation; where the trace does not tell it, as in CUDA graphs, by the kernel's name, which is made of it."""
    return written.get(operation) or written.get(("", kernel)) or ("",)


def _kind(name: str, primitive: str, scope: Sequence[str]) -> str:
    low = name.lower()
    kind = next((kind for kind, words in KINDS.items() if any(word in low for word in words)), "other")
    if kind == "other" and ("mosaic" in low or primitive == "triton_kernel_call") and ("attention" in scope or not scope):
        return "attention"  # such kernels are named alike, whatever they do
    return PRIMITIVES.get(primitive, kind) if kind == "other" else kind


def written_in_memory() -> Written:
    """Of all operations of all compiled programs that are in memory."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for executable in jax.devices()[0].client.live_executables():
        for module in executable.hlo_modules():
            for operation, path in INSTRUCTION.findall(module.to_string()):
                *scope, primitive = path.split("/")
                parts = (*(part for part in scope if not STRUCTURE.match(part)), primitive)
                found[module.name, operation] = parts
                found.setdefault(("", re.sub(r"\W", "_", operation)), parts)
    return found


def by_kind(kernels: Iterable[Kernel]) -> dict[str, dict[str, float]]:
    """Milliseconds of each device's kernels by kind; from the first to the end of the last; with none running."""
    found: dict[str, dict[str, float]] = {}
    ends: dict[str, float] = {}
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        row = found.setdefault(kernel.device, dict.fromkeys((*KINDS, "other", "idle"), 0.0) | {"span": -kernel.start / 1e6})
        row[kernel.kind] += kernel.duration / 1e6
        row["idle"] += max(0.0, kernel.start - ends.get(kernel.device, kernel.start)) / 1e6
        ends[kernel.device] = max(ends.get(kernel.device, 0.0), kernel.end)
    for device, end in ends.items():
        found[device]["span"] += end / 1e6
    return found


def largest_costs(kernels: Sequence[Kernel], count: int = 10) -> list[Cost]:
    """What took the most time, by scope and kind; blocks are told together."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kernel in kernels:
        scope = "/".join(re.sub(r"^block_\d+$", "block", part) for part in kernel.scope)
        sums[scope, kernel.kind].append(kernel.duration / 1e9)
    total = sum(map(sum, sums.values()))
    costs = [Cost(*key, len(seconds), sum(seconds), sum(seconds) / total) for key, seconds in sums.items()]
    return sorted(costs, key=lambda cost: -cost.seconds)[:count]


def write_trace(folder: Path, kernels: Sequence[Kernel], path: Path) -> None:
    """JAX's trace as one file for Perfetto, and in it, for every device, the scopes as slices within slices."""
    with gzip.open(next(folder.rglob("*.trace.json.gz"))) as file:
        trace = json.load(file)
    for number, device in enumerate(sorted({kernel.device for kernel in kernels})):
        pid = 9000 + number
        trace["traceEvents"].append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": f"scopes of {device}"}})
        for name, start, end in slices([kernel for kernel in kernels if kernel.device == device]):
            # Whole nanoseconds, so that what ends together still does.
            begun, ended = round(start), round(end)
            place = {"pid": pid, "tid": 1, "ts": begun / 1e3, "dur": (ended - begun) / 1e3}
            trace["traceEvents"].append({"ph": "X", "name": name} | place)
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        json.dump(trace, file)


def slices(kernels: Sequence[Kernel]) -> list[tuple[str, float, float]]:
    """(scope, start, end) of kernels in a row in the same scope, nested; the order is that of their ends.

    A block whose operation comes again is the next block, where blocks are one loop. Kernels without a scope end none.
    """
    found: list[tuple[str, float, float]] = []
    open_: list[tuple[str, float, set[str]]] = []
    until = 0.0

    def close(depth: int, at: float) -> None:
        while len(open_) > depth:
            name, start, _ = open_.pop()
            found.append((name, start, max(start, min(until, at))))

    for kernel in kernels:
        if not kernel.scope:
            continue
        depth = 0
        for (name, _, seen), part in zip(open_, kernel.scope, strict=False):
            if name != part or (name == "block" and kernel.name in seen):
                break
            depth += 1
        close(depth, kernel.start)
        open_ += [(part, kernel.start, set()) for part in kernel.scope[depth:]]
        for _, _, seen in open_:
            seen.add(kernel.name)
        until = max(until, kernel.end)
    close(0, float("inf"))
    return found
