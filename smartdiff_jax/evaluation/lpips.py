"""LPIPS, version 0.1 (Zhang et al. 2018): how far apart two pictures are to a network trained to see.

Weights are brought in a folder, under the names that torchvision's models and the `lpips` package give them:

    alexnet.safetensors    features.0.weight [64, 3, 11, 11], features.0.bias, … of torchvision's alexnet
    lpips_alex.safetensors lin0.model.1.weight [1, 64, 1, 1], … of lpips/weights/v0.1/alex.pth
    vgg16.safetensors, lpips_vgg.safetensors    the same of VGG16

Either pair or both; keys beside these are not read.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load_file

from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.evaluation.metrics import Clip, check_shapes, check_side

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of colours from -1 to 1, before the network."""

EPS = 1e-10
LEAST_SIDE = 32


@dataclasses.dataclass(frozen=True)
class Convolution:
    """By its number in torchvision's `features`; a ReLU follows. compared: what comes out is. pool: what is done before."""

    index: int
    inputs: int
    outputs: int
    side: int = 3
    stride: int = 1
    padding: int = 1
    compared: bool = True
    pool: int = 0


NETWORKS: dict[str, tuple[str, tuple[Convolution, ...]]] = {
    "alex": (
        "alexnet",
        (
            Convolution(0, 3, 64, 11, 4, 2),
            Convolution(3, 64, 192, 5, 1, 2, pool=3),
            Convolution(6, 192, 384, pool=3),
            Convolution(8, 384, 256),
            Convolution(10, 256, 256),
        ),
    ),
    "vgg": (
        "vgg16",
        tuple(
            Convolution(index, inputs, outputs, compared=compared, pool=pool)
            for index, inputs, outputs, compared, pool in (
                (0, 3, 64, False, 0), (2, 64, 64, True, 0), (5, 64, 128, False, 2), (7, 128, 128, True, 0),
                (10, 128, 256, False, 2), (12, 256, 256, False, 0), (14, 256, 256, True, 0), (17, 256, 512, False, 2),
                (19, 512, 512, False, 0), (21, 512, 512, True, 0), (24, 512, 512, False, 2), (26, 512, 512, False, 0),
                (28, 512, 512, True, 0),
            )
        ),
    ),
}  # fmt: skip
"""By name: the file of the network's weights, and its convolutions. A pool is 2 apart and so many pixels wide."""


class Lpips:
    """One network and its heads; called with two clips, the mean over their frames."""

    def __init__(self, network: str, weights: dict[str, np.ndarray], heads: dict[str, np.ndarray]):
        self.network = network
        self._weights = {name: jnp.asarray(value, jnp.float32) for name, value in (weights | heads).items()}

    @classmethod
    def read(cls, folder: Path) -> "list[Lpips]":
        """Those that a folder holds. Raises InvalidRequest where it holds none, or one of other shapes."""
        found = []
        for name, (file, convolutions) in NETWORKS.items():
            places = folder / f"{file}.safetensors", folder / f"lpips_{name}.safetensors"
            if all(place.is_file() for place in places):
                found.append(cls(name, _weights(places[0], convolutions), _heads(places[1], convolutions)))
        if not found:
            files = " or ".join(f"{file}.safetensors with lpips_{name}.safetensors" for name, (file, _) in NETWORKS.items())
            raise InvalidRequest("lpips", str(folder), f"must be a folder with {files} (docs/evaluation.md says from where)")
        return found

    def __call__(self, a: Clip, b: Clip) -> float:
        check_shapes(a, b)
        check_side("lpips", a, LEAST_SIDE)
        pairs = zip(a, b, strict=True)
        return float(np.mean([_of_pair(self.network, self._weights, np.stack(pair)) for pair in pairs]))


def _weights(file: Path, convolutions: tuple[Convolution, ...]) -> dict[str, np.ndarray]:
    shapes = {}
    for layer in convolutions:
        shapes[f"features.{layer.index}.weight"] = (layer.outputs, layer.inputs, layer.side, layer.side)
        shapes[f"features.{layer.index}.bias"] = (layer.outputs,)
    return _read(file, shapes)


def _heads(file: Path, convolutions: tuple[Convolution, ...]) -> dict[str, np.ndarray]:
    widths = [layer.outputs for layer in convolutions if layer.compared]
    return _read(file, {f"lin{number}.model.1.weight": (1, width, 1, 1) for number, width in enumerate(widths)})


def _read(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InvalidRequest("lpips", str(file), f"cannot be read ({error}); write it again") from None
    for name, shape in shapes.items():
        told = found[name].shape if name in found else "not there"
        if told != shape:
            raise InvalidRequest("lpips", str(file), f"{name} must be {shape} and is {told}; take the whole network's weights")
    return {name: found[name] for name in shapes}


@partial(jax.jit, static_argnums=0)
def _of_pair(network: str, weights: dict[str, Array], pair: UInt8[Array, "2 h w 3"]) -> Float[Array, ""]:
    x = (pair.astype(jnp.float32) / 127.5 - 1 - jnp.array(SHIFT)) / jnp.array(SCALE)
    distance, number = jnp.float32(0), 0
    for layer in NETWORKS[network][1]:
        if layer.pool:
            window = (1, layer.pool, layer.pool, 1)
            x = lax.reduce_window(x, -jnp.inf, lax.max, window, (1, 2, 2, 1), "VALID")
        kernel, padding = weights[f"features.{layer.index}.weight"], [(layer.padding, layer.padding)] * 2
        x = lax.conv_general_dilated(
            x, kernel, (layer.stride,) * 2, padding, precision=lax.Precision.HIGHEST,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )  # fmt: skip
        x = jax.nn.relu(x + weights[f"features.{layer.index}.bias"])
        if layer.compared:
            unit = x / (jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)) + EPS)
            head = weights[f"lin{number}.model.1.weight"].reshape(-1)
            distance += jnp.mean(jnp.sum((unit[0] - unit[1]) ** 2 * head, axis=-1))
            number += 1
    return distance
