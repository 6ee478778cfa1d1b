"""Tensors of PyTorch's `.pth` files, memory-mapped. Only the original releases need it, and only it needs PyTorch."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.weights.tensor_file import Tensor, read_header


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor of a memory-mapped .pth file."""

    tensor: Any
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        tensor = self.tensor.contiguous()
        if self.dtype == ml_dtypes.bfloat16:  # NumPy has no such dtype of its own: only the bits travel
            return tensor.view(_torch().int16).numpy().view(self.dtype)
        return tensor.numpy()


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a .pth state dict; those of the .safetensors file of the same name where there is one.

    Raises CheckpointError where the file is missing or damaged, is no plain dict of tensors, or PyTorch is not installed.
    """
    twin = file.with_suffix(".safetensors")
    if twin.is_file():
        return dict(read_header(twin)[0])
    if not file.is_file():
        raise CheckpointError(f"{file}: not found; download the whole release (Wan2.1 or Wan2.2-A14B, text-to-video)")
    torch = _torch()
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {key: TorchTensor(tensor, tuple(tensor.shape), _dtype(tensor)) for key, tensor in state.items()}
    except (RuntimeError, ValueError, TypeError, AttributeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).split(". ")[0] or type(error).__name__  # PyTorch adds paragraphs of advice
        raise CheckpointError(f"{file}: not a readable state dict ({reason}); download it again") from error


def _dtype(tensor: Any) -> np.dtype:
    name = str(tensor.dtype).removeprefix("torch.")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _torch() -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CheckpointError(
            "reading a .pth file needs PyTorch, which is not installed; run `pip install smartdiff_jax[convert]`"
        ) from error
    return torch
