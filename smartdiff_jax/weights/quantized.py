"""Storage of the bundled models in few bits: matrices as packed integers with a scale for every 64, all the rest in float16.

    q = round(x / scale),  |q| <= h = 2^(bits - 1) - 1,  q + h in `bits` bits, the highest first

Each group has the scale that loses least, among max |x| / h and a few below it. A tensor is stored as uint8 [groups, 8 * bits],
its scales beside it as float16 [groups]; its shape is in the file's metadata. Zeros in front of a tensor are not stored: two
taps in three are zero in a video autoencoder made for pictures (`[full shape, stored shape]`).
Storage only: the loader hands out float32 and the run computes in its own dtype.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.weights.tensor_file import Tensor, write

FORMAT = "smartdiff-packed"
SCALE = ".scale"
SHAPES = "shapes"  # the entry of the metadata
GROUP = 64
BITS = range(2, 9)
MIN_QUANTIZED_SIZE = 4096  # below it the bytes saved are not worth the error
SHRINKS = np.linspace(1.0, 0.7, 7, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A packed tensor and its scales, read as float32. stored: the shape that is left without the zeros in front."""

    values: Tensor
    scale: Tensor
    shape: tuple[int, ...]
    stored: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self) -> np.ndarray:
        packed = self.values.read()
        bits = packed.shape[1] // 8
        split = np.unpackbits(packed, axis=1).reshape(-1, bits)
        whole = np.zeros((len(split), 8), np.uint8)
        whole[:, 8 - bits :] = split
        integers = np.packbits(whole, axis=1).reshape(-1, GROUP).astype(np.float32) - _highest(bits)
        numbers = (integers * self.scale.read().astype(np.float32)[:, None]).reshape(-1)[: math.prod(self.stored)]
        missing = [(full - kept, 0) for full, kept in zip(self.shape, self.stored, strict=True)]
        return np.pad(numbers.reshape(self.stored), missing)


def _highest(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def quantize(flat: Mapping[str, np.ndarray], bits: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Float tensors to their storage, and the metadata of the file they go into.

    A tensor becomes `name` and `name.scale`, or `name` in float16 where it is small (an error of 2^-11 relative; float32 is
    kept where float16 would overflow or lose small numbers). Tensors that are not floats pass unchanged.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits}: must be {BITS.start} to {BITS.stop - 1}")
    stored: dict[str, np.ndarray] = {}
    shapes: dict[str, Any] = {}
    for name, tensor in flat.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in flat:
            raise ValueError(f"{name!r} is the name of the scale of {name.removesuffix(SCALE)!r}")
        if np.issubdtype(tensor.dtype, np.integer) or tensor.dtype == np.bool_:
            stored[name] = tensor
            continue
        tensor = tensor.astype(np.float32)
        if tensor.ndim < 2 or tensor.size < MIN_QUANTIZED_SIZE:
            stored[name] = _half(tensor)
        else:
            kept = _without_zeros_in_front(tensor)
            stored[name], stored[name + SCALE] = _quantize(kept, bits)
            shapes[name] = [tensor.shape, kept.shape]
    return stored, {"format": FORMAT, SHAPES: json.dumps(shapes, separators=(",", ":"))}


def _without_zeros_in_front(tensor: np.ndarray) -> np.ndarray:
    used = np.nonzero(tensor)
    return tensor[tuple(slice(int(at.min()) if at.size else size, None) for at, size in zip(used, tensor.shape, strict=True))]


def _quantize(tensor: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    groups = np.pad(tensor.reshape(-1), (0, -tensor.size % GROUP)).reshape(-1, GROUP)
    highest = _highest(bits)
    best = np.full(len(groups), np.inf, np.float32)
    integers, scales = np.zeros(groups.shape, np.int8), np.zeros(len(groups), np.float16)
    for shrink in SHRINKS:
        scale = (np.abs(groups).max(1) * (shrink / highest)).astype(np.float16)
        wide = scale.astype(np.float32)[:, None]
        rounded = np.clip(np.rint(groups / np.where(wide > 0, wide, 1)), -highest, highest)
        lost = np.square(rounded * wide - groups).sum(1)
        better = lost < best
        best[better], integers[better], scales[better] = lost[better], rounded[better], scale[better]
    split = np.unpackbits((integers.astype(np.int16) + highest).astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
    return np.packbits(split.reshape(-1, GROUP * bits), axis=1), scales


def _half(tensor: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        half = tensor.astype(np.float16)
    return half if np.allclose(half.astype(np.float32), tensor, rtol=2**-11, atol=2**-24) else tensor


def save(file: Path, flat: Mapping[str, np.ndarray], bits: int) -> None:
    """Writes a component's float tensors as a safetensors file of so many bits a number."""
    stored, metadata = quantize(flat, bits)
    write(file, stored, metadata=metadata)


def dequantized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of such a file under their own names, as the loader reads any other file.

    Raises CheckpointError where a packed tensor has lost its scales or its shape, or they do not fit.
    """
    try:
        shapes = {name: tuple(map(tuple, both)) for name, both in json.loads(metadata[SHAPES]).items()}
        plain: dict[str, Tensor] = {n: t for n, t in tensors.items() if n.removesuffix(SCALE) not in shapes}
        for name, (shape, stored) in shapes.items():
            values, scale = tensors[name], tensors[name + SCALE]
            groups = -(-math.prod(stored) // GROUP)
            fits = len(values.shape) == 2 and values.shape[0] == groups and values.shape[1] // 8 in BITS
            if not fits or scale.shape != (groups,) or len(stored) != len(shape):
                raise CheckpointError(f"{name}: {values.shape} and scales {scale.shape} do not fit; download the file again")
            plain[name] = QuantizedTensor(values, scale, shape, stored)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"a packed file without {error}; download the file again") from error
    return plain
