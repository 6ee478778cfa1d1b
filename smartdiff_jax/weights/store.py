"""Converted weights kept on disk, so that a second start restores them instead of converting again.

An entry is one Orbax checkpoint, root/<key>/, of dotted path to array, restored straight into whatever sharding is asked for.
The key is a digest of all that the numbers depend on: the architecture with its key rules, the numbers of its config, the
source files (name, size, time of change, header) and the dtype. A changed source is another entry, never a stale one: the
samples of `Component.fingerprint` would not do, which pass over a change of one tensor. A copy of the source is another entry
too, which costs one conversion; a job's checkpoint must go on beside a copy on another host, and goes by the fingerprint.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from smartdiff_jax.models.family import Architecture
from smartdiff_jax.weights.stream import dotted
from smartdiff_jax.weights.tensor_file import read_header

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when the meaning of a transform changes: old entries are then never read again
MANIFEST = "manifest.json"
WORK_PREFIX = ".work-"
STALE_AFTER = 86_400.0  # seconds after which a work folder belongs to a process that was killed


@dataclasses.dataclass(frozen=True)
class WeightStore:
    """A folder of converted weights, safe to share between processes."""

    root: Path

    def get_or_convert(self, key: str, abstract_state: nnx.State, make: Callable[[], nnx.State]) -> nnx.State:
        """The state of an entry, placed as `abstract_state` says; `make()` where there is no such entry, which it then fills.

        abstract_state: leaves are jax.ShapeDtypeStruct with a sharding (see `stream.abstract`).
        A damaged entry is removed and made again, with a warning in the log. On several hosts every host reads its shards
        from the source, which is parallel already: the store is not used.
        """
        if jax.process_count() > 1:
            return make()
        self._remove_stale()
        entry = self.root.absolute() / key
        if entry.exists():
            damage = _damage(entry, _flat(abstract_state))
            if not damage:
                return _restore(entry, abstract_state)
            logger.warning("stored weights %s are damaged (%s): removed and made again", entry, damage)
            shutil.rmtree(entry, ignore_errors=True)  # another process may be removing it too
        state = make()
        self._save(entry, _flat(state))
        return state

    def _save(self, entry: Path, flat: dict[str, jax.Array]) -> None:
        import orbax.checkpoint as ocp

        needed = sum(array.nbytes for array in flat.values())
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < 1.05 * needed:
            logger.warning("weights not stored: %s has %.1f GB free of %.1f needed", self.root, free / 1e9, needed / 1e9)
            return
        with tempfile.TemporaryDirectory(prefix=WORK_PREFIX, dir=self.root, ignore_cleanup_errors=True) as work:
            complete = Path(work) / "entry"
            with _checkpointer() as checkpointer:
                checkpointer.save(complete, args=ocp.args.PyTreeSave(flat))
            manifest = {"leaves": _leaves(flat), "files": _checksums(complete)}
            (complete / MANIFEST).write_text(json.dumps(manifest))
            try:
                os.rename(complete, entry)
            except OSError:
                if not entry.exists():  # else another process was first, with the same numbers
                    raise

    def _remove_stale(self) -> None:
        for work in self.root.glob(f"{WORK_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - work.stat().st_mtime > STALE_AFTER:
                    shutil.rmtree(work, ignore_errors=True)


def store_key(architecture: Architecture, config: Any, files: Sequence[Path], dtype: DTypeLike) -> str:
    """Digest of what converted weights depend on; config is the component's pydantic model.

    Raises CheckpointError where a file is missing or damaged.
    """
    rules = [(r.pattern, r.path, r.transform.__qualname__, r.keep_float32) for r in architecture.key_rules]
    sources = []
    for file in sorted(files):
        tensors, metadata = read_header(file)
        header = [(key, t.shape, t.dtype.name, t.offset) for key, t in tensors.items()]
        stat = file.stat()
        sources.append((file.name, stat.st_size, stat.st_mtime_ns, metadata, header))
    content = [
        FORMAT_VERSION,
        f"{architecture.config.__module__}.{architecture.config.__qualname__}",
        rules,
        config.model_dump(mode="json"),
        sources,
        jnp.dtype(dtype).name,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    """An Orbax checkpointer, and closed again. Orbax is imported where it is used: a bundled model starts without it."""
    import orbax.checkpoint as ocp

    # Weights hardly compress; without trying, a restore is 2.7 times as fast and a save 5 times (measured, 1 GB of bfloat16).
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
    try:
        yield checkpointer
    finally:
        checkpointer.close()


def _restore(entry: Path, abstract_state: nnx.State) -> nnx.State:
    import orbax.checkpoint as ocp

    wanted = _flat(abstract_state)
    arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
    with _checkpointer() as checkpointer:
        arrays = checkpointer.restore(entry, args=arguments)
    return nnx.from_flat_state(
        [(path, variable.replace(arrays[dotted(path)])) for path, variable in nnx.to_flat_state(abstract_state)]
    )


def _damage(entry: Path, wanted: Mapping[str, Any]) -> str:
    """What is wrong with an entry, or nothing. Orbax notices neither a flipped bit nor, cleanly, a short file."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text())
        leaves, files = manifest["leaves"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest is missing or unreadable"
    if leaves != _leaves(wanted):
        return "it holds other parameters"
    found = _checksums(entry)
    changed = sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name))
    return f"{changed[0]} is missing, new or changed" if changed else ""


def _leaves(flat: Mapping[str, Any]) -> dict[str, list]:
    return {path: [list(leaf.shape), jnp.dtype(leaf.dtype).name] for path, leaf in flat.items()}


def _checksums(entry: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file of an entry but the manifest, by its path inside; read in parallel."""
    files = sorted(file for file in entry.rglob("*") if file.is_file() and file != entry / MANIFEST)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        crcs = list(pool.map(_crc32, files))
    return {str(f.relative_to(entry)): [f.stat().st_size, crc] for f, crc in zip(files, crcs, strict=True)}


def _crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def _flat(state: nnx.State) -> dict[str, Any]:
    return {dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}
