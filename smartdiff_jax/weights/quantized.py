"""8-bit storage of the bundled models: matrices as int8 with one float32 scale per channel, all the rest in float16.

    q = round(x / scale),  scale = max |x| over the channel / 127,  so  |x - q scale| <= scale / 2

The channel axis is the first or the last, whichever loses less; the scale keeps the tensor's rank (1 on every other axis), so
it says itself how to broadcast. Storage only: the loader hands out float32 and the run computes in its own dtype.
A file says that it is so stored by its metadata, {"format": "smartdiff-int8"}.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.weights.tensor_file import Tensor, write

FORMAT = "smartdiff-int8"
SCALE = ".scale"
MIN_QUANTIZED_SIZE = 4096  # below it the bytes saved are not worth the error


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """An int8 tensor and its scale, read as float32."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self) -> np.ndarray:
        return self.values.read().astype(np.float32) * self.scale.read()


def quantize(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Float tensors to their 8-bit storage: `name` int8 and `name.scale` float32, or `name` in float16 where it is small.

    Error of an int8 tensor: at most half its scale. Of a float16 one: 2^-11 relative (float32 is kept where float16 would
    overflow or lose small numbers). Tensors that are not floats pass unchanged.
    """
    stored: dict[str, np.ndarray] = {}
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
            stored[name], stored[name + SCALE] = min(
                (_quantize(tensor, axis) for axis in (0, tensor.ndim - 1)),
                key=lambda pair: float(np.square(pair[0] * pair[1] - tensor).sum()),
            )
    return stored


def _quantize(tensor: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    others = tuple(a for a in range(tensor.ndim) if a != axis)
    scale = np.abs(tensor).max(axis=others, keepdims=True) / np.float32(127)
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.rint(tensor / scale).astype(np.int8), scale


def _half(tensor: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        half = tensor.astype(np.float16)
    return half if np.allclose(half.astype(np.float32), tensor, rtol=2**-11, atol=2**-24) else tensor


def save(file: Path, flat: Mapping[str, np.ndarray]) -> None:
    """Writes a component's float tensors as an 8-bit safetensors file."""
    write(file, quantize(flat), metadata={"format": FORMAT})


def dequantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an 8-bit file under their own names, as the loader reads any other file.

    Raises CheckpointError where an int8 tensor has lost its scale, or a scale does not fit.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in tensors:
            continue
        scale = tensors.get(name + SCALE)
        if scale is None:
            if tensor.dtype == np.int8:
                raise CheckpointError(f"{name}: an 8-bit tensor without {name + SCALE}; download the file again")
            plain[name] = tensor
        elif len(scale.shape) != len(tensor.shape) or any(
            s not in (1, n) for s, n in zip(scale.shape, tensor.shape, strict=True)
        ):
            raise CheckpointError(f"{name}: a scale of {scale.shape} does not fit {tensor.shape}; download the file again")
        else:
            plain[name] = QuantizedTensor(tensor, scale)
    return plain
