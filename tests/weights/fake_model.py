"""A small module with every kind of parameter the loader knows, and a checkpoint of it with PyTorch-like names."""

import json

import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import BaseModel

from smartdiff_jax.models.family import Architecture, KeyRule, linear


class Config(BaseModel, frozen=True):
    width: int = 8
    hidden: int = 16
    num_layers: int = 3


class Block(nnx.Module):
    def __init__(self, config: Config):
        self.kernel = nnx.Param(jnp.zeros((config.num_layers, config.width, config.hidden)))
        self.scale = nnx.Param(jnp.zeros((config.num_layers, config.width)))


class Model(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jnp.zeros((16, config.width)))
        self.blocks = Block(config)
        self.stages = nnx.List([nnx.Linear(config.width, config.hidden, rngs=rngs) for _ in range(2)])
        self.steps = nnx.Param(jnp.zeros((4,), jnp.int32))


ARCHITECTURE = Architecture(
    config=Config,
    build=Model,
    key_rules=(
        KeyRule(r"shared\.weight", "embedding"),
        KeyRule(r"tied\.weight", "embedding"),
        KeyRule(r"blocks\.(?P<layer>\d+)\.linear\.weight", "blocks.kernel", linear),
        KeyRule(r"blocks\.(?P<layer>\d+)\.norm\.weight", "blocks.scale", keep_float32=True),
        KeyRule(r"(stages\.\d+)\.weight", r"\1.kernel", linear),
        KeyRule(r"(stages\.\d+)\.bias", r"\1.bias", keep_float32=True),
        KeyRule(r"steps", "steps"),
    ),
    ignored_keys=r"optimizer\..*",
)


def checkpoint(config: Config | None = None, dtype=np.float32) -> dict[str, np.ndarray]:
    config = config or Config()
    draw = np.random.default_rng(0).standard_normal
    flat = {"shared.weight": draw((16, config.width)), "optimizer.step": np.zeros(3)}
    for layer in range(config.num_layers):
        flat[f"blocks.{layer}.linear.weight"] = draw((config.hidden, config.width))
        flat[f"blocks.{layer}.norm.weight"] = draw(config.width)
    for stage in range(2):
        flat[f"stages.{stage}.weight"] = draw((config.hidden, config.width))
        flat[f"stages.{stage}.bias"] = draw(config.hidden)
    return {key: tensor.astype(dtype) for key, tensor in flat.items()} | {"steps": np.arange(4, dtype=np.int32)}


def put(file, content):
    """A JSON file, with the folders it needs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
