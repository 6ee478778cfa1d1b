"""Reading and writing safetensors files one tensor at a time.

    8 bytes: length n of the header | n bytes: JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes, end to end

The layout is that of https://github.com/huggingface/safetensors. Reading is done here, and not by that package, because a
tensor must stay on disk until its place is known: the header gives every shape at once, and a tensor is then a memory-mapped
view of any dtype (bfloat16 and float8 too) of which a device reads only its shard.
"""

import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from smartdiff_jax.errors import CheckpointError

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096


@runtime_checkable
class Tensor(Protocol):
    """A tensor whose shape is known and whose numbers are read when asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray:
        """The numbers; a view of the file where that is possible. Not to be written to."""
        ...


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file; offset in bytes from the start of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    def read(self) -> np.ndarray:
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, self.dtype)
        size = math.prod(self.shape) * self.dtype.itemsize
        raw = np.memmap(self.file, np.uint8, "r", self.offset, (size,))
        return np.asarray(raw).view(self.dtype).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    """A tensor already in memory."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self) -> np.ndarray:
        return self.array


def read_header(file: Path) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata; only the header is read.

    Raises CheckpointError where the file is missing, truncated or damaged, or holds a dtype not known here.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
            if length is None or length > min(size - 8, MAX_HEADER):
                raise _damaged(file, f"{size} bytes are too few for its header")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except ValueError as error:
        raise _damaged(file, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a table")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(file, "its metadata is not a table")

    tensors, spans = {}, []
    for name, entry in header.items():
        tensor, end = _parse(file, name, entry, base=8 + length)
        tensors[name] = tensor
        spans.append((tensor.offset, end))
    expected = 8 + length
    for begin, end in sorted(spans):
        if begin != expected:
            raise _damaged(file, f"its tensors overlap or leave a hole at byte {min(begin, expected)}")
        expected = end
    if expected != size:
        raise _damaged(file, f"it has {size} bytes and its header speaks of {expected}")
    return tensors, metadata


def _parse(file: Path, name: str, entry: Any, base: int) -> tuple[FileTensor, int]:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        fits = isinstance(code, str) and all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(file, f"the header entry of {name!r} is broken") from error
    if not fits:
        raise _damaged(file, f"the header entry of {name!r} is broken")
    if code not in DTYPES:
        raise CheckpointError(f"{file}: {name!r} has dtype {code!r}; this reader knows {', '.join(DTYPES)}")
    dtype = DTYPES[code]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _damaged(file, f"{name!r} has {end - begin} bytes, {code}{list(shape)} needs {math.prod(shape) * dtype.itemsize}")
    return FileTensor(file, shape, dtype, base + begin), base + end


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file}: {why}; the file is truncated or damaged: download it again")


def write(file: Path, tensors: Mapping[str, Tensor | np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, holding one tensor in memory at a time. The file appears whole or not at all.

    metadata: strings to strings, kept under `__metadata__`.
    """
    sources = {name: ArrayTensor(t) if isinstance(t, np.ndarray) else t for name, t in tensors.items()}
    order = sorted(sources, key=lambda name: (-sources[name].dtype.itemsize, name))  # widest first keeps all aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        tensor = sources[name]
        end = offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(struct.pack("<Q", len(encoded)) + encoded)
            for name in order:
                stream.write(np.ascontiguousarray(sources[name].read()).reshape(-1).view(np.uint8).data)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def sample_digest(files: Sequence[Path]) -> str:
    """Digest of names, sizes and headers of files, and of samples all over them: two tunings of a model differ everywhere."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        size = file.stat().st_size
        with file.open("rb") as opened:
            head = opened.read(8)
            digest.update(f"{file.name} {size} ".encode() + head + opened.read(min(int.from_bytes(head, "little"), MAX_HEADER)))
            for start in np.linspace(opened.tell(), max(size - SAMPLE_BYTES, opened.tell()), NUM_SAMPLES).astype(int):
                opened.seek(int(start))
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
