"""A request between two chunks of denoising, as bytes: what a killed process leaves so that another gives the same picture.

The format is safetensors; what is no array is JSON in its header. Nothing is ever unpickled.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.sharding.multihost import fetch

Leaves = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a request stands.

    batch, step: the batch of outputs being denoised, and how many of its steps are done.
    carry: the loop's carry at that point, by path; empty at step 0.
    results: latents [b, c, f, h, w] of each batch before it. steps: the report's letters of their outputs.
    """

    batch: int
    step: int
    carry: Leaves
    results: tuple[np.ndarray, ...]
    steps: tuple[str, ...]

    def to_bytes(self, fingerprint: str) -> bytes:
        """fingerprint: of all that decides the picture's bits besides the request: model, devices, versions."""
        arrays = {f"carry{path}": leaf for path, leaf in self.carry.items()}
        arrays |= {f"result.{index}": result for index, result in enumerate(self.results)}
        header = {
            "batch": self.batch,
            "step": self.step,
            "steps": self.steps,
            "dtypes": {name: array.dtype.name for name, array in arrays.items()},
        }
        # As bytes: safetensors' NumPy side does not know every dtype of JAX.
        raw = {name: np.frombuffer(array.tobytes(), np.uint8).reshape(*array.shape, -1) for name, array in arrays.items()}
        return save(raw, {"fingerprint": fingerprint, "state": json.dumps(header)})

    @classmethod
    def from_file(cls, path: str, fingerprint: str) -> "Checkpoint":
        """Raises CheckpointError for a file that is damaged, or was made where the bits would come out differently."""
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") != fingerprint:
                    raise CheckpointError(f"{path} was made by {metadata.get('fingerprint')!r}, this is {fingerprint!r}")
                header = json.loads(metadata["state"])
                arrays = {
                    name: file.get_tensor(name).view(jax.numpy.dtype(header["dtypes"][name]))[..., 0] for name in file.keys()
                }
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is no checkpoint that can be read: {error}") from error
        count = sum(name.startswith("result.") for name in arrays)
        return cls(
            batch=header["batch"],
            step=header["step"],
            carry={name.removeprefix("carry"): leaf for name, leaf in arrays.items() if name.startswith("carry")},
            results=tuple(arrays[f"result.{index}"] for index in range(count)),
            steps=tuple(header["steps"]),
        )


def to_host(carry: Any) -> dict[str, np.ndarray]:
    """Leaves by path, copied: the loop gives the carry's memory to its next chunk. All hosts must call it."""
    return {jax.tree_util.keystr(path): np.array(fetch(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(carry)}


def restore(leaves: Leaves, like: Any) -> Any:
    """A carry shaped and placed as `like`. Raises CheckpointError where the leaves are another model's or request's."""

    def place(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        found = leaves.get(name)
        if found is None or found.shape != leaf.shape or found.dtype != leaf.dtype:
            what = None if found is None else (found.shape, found.dtype.name)
            raise CheckpointError(f"the checkpoint's carry{name} is {what}, the loop takes {leaf.shape}, {leaf.dtype.name}")
        return jax.device_put(found, leaf.sharding, may_alias=False)

    return jax.tree_util.tree_map_with_path(place, like)
