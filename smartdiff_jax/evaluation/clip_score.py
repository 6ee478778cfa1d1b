"""CLIP score (Hessel et al. 2021): how well a picture goes with its prompt, 100 times the cosine of what CLIP makes of both.

CLIP is brought as a folder that transformers' CLIPModel reads, openai/clip-vit-large-patch14 say: config.json,
model.safetensors, tokenizer.json. The prompt is that of the report beside a result. Both towers are one transformer; pictures
are made small as transformers' CLIPImageProcessor does it. In float32.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.evaluation.metrics import Clip

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DEFAULTS = {"text_config": (8, 1e-5), "vision_config": (12, 1e-5)}
"""Heads and epsilon that transformers takes where a config.json is silent."""

Weights = dict[str, Array]


class ClipScore:
    """One CLIP; called with a clip and its prompt, the mean over frames."""

    def __init__(self, folder: Path):
        """Raises InvalidRequest for a folder that is no CLIP."""
        try:
            config = json.loads((folder / "config.json").read_text())
            weights = load_file(folder / "model.safetensors")
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._text, self._vision = (_numbers(config, name) for name in ("text_config", "vision_config"))
            patches, self._length = (
                weights[f"{tower}_model.embeddings.position_embedding.weight"].shape[0] for tower in ("vision", "text")
            )
            self._size = math.isqrt(patches - 1) * weights["vision_model.embeddings.patch_embedding.weight"].shape[-1]
            for name in ("text_projection", "visual_projection"):
                weights[f"{name}.weight"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            told = f"{type(error).__name__}: {error}; give a folder of transformers' CLIPModel"
            raise InvalidRequest("clip", str(folder), told) from None
        except Exception as error:  # the tokenizers library raises bare Exception for anything it cannot parse
            raise InvalidRequest("clip", str(folder), f"holds no tokenizer ({error}); download it again") from None
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._length)
        self._weights = {name: jnp.asarray(value, jnp.float32) for name, value in weights.items() if value.dtype != np.int64}

    def __call__(self, clip: Clip, prompt: str) -> float:
        found = self._tokenizer.encode(prompt).ids
        ids = np.pad(np.array(found, np.int32), (0, self._length - len(found)))
        text = _text_state(self._weights, ids, np.int32(len(found) - 1), self._text)
        scores = [_picture_state(self._weights, small(frame, self._size), self._vision) @ text for frame in clip]
        return float(np.mean([max(100 * float(score), 0.0) for score in scores]))


def _numbers(config: dict[str, Any], name: str) -> tuple[int, float, str]:
    told, (heads, eps) = config[name], DEFAULTS[name]
    return told.get("num_attention_heads", heads), told.get("layer_norm_eps", eps), told.get("hidden_act", "quick_gelu")


def small(frame: np.ndarray, size: int) -> Float[np.ndarray, "s s 3"]:
    """The shorter side resized to `size`, the middle of the longer one, colours normed."""
    height, width = frame.shape[:2]
    scale = size / min(height, width)
    wide, high = (size if side == min(height, width) else int(side * scale) for side in (width, height))
    picture = np.asarray(Image.fromarray(frame).resize((wide, high), Image.Resampling.BICUBIC))
    top, left = (high - size) // 2, (wide - size) // 2
    unit = picture[top : top + size, left : left + size].astype(np.float32) / 255
    return (unit - np.array(MEAN, np.float32)) / np.array(STD, np.float32)


@partial(jax.jit, static_argnums=3)
def _text_state(
    weights: Weights, ids: Int[Array, " l"], end: Int[Array, ""], numbers: tuple[int, float, str]
) -> Float[Array, " e"]:
    with jax.default_matmul_precision("highest"):
        x = weights["text_model.embeddings.token_embedding.weight"][ids]
        x = x + weights["text_model.embeddings.position_embedding.weight"]
        x = _norm(weights, "text_model.final_layer_norm", _tower(weights, "text_model", x, numbers, causal=True), numbers[1])
        # The token that ends the text has seen all of it, and nothing of the padding behind it.
        return _unit(weights["text_projection.weight"] @ x[end])


@partial(jax.jit, static_argnums=2)
def _picture_state(weights: Weights, picture: Float[Array, "s s 3"], numbers: tuple[int, float, str]) -> Float[Array, " e"]:
    with jax.default_matmul_precision("highest"):
        kernel = weights["vision_model.embeddings.patch_embedding.weight"]
        side, grid = kernel.shape[-1], picture.shape[0] // kernel.shape[-1]
        patches = picture.reshape(grid, side, grid, side, 3).transpose(0, 2, 4, 1, 3).reshape(grid * grid, -1)
        x = patches @ kernel.reshape(len(kernel), -1).T
        x = jnp.concatenate([weights["vision_model.embeddings.class_embedding"].reshape(1, -1), x])
        x = x + weights["vision_model.embeddings.position_embedding.weight"]
        x = _norm(weights, "vision_model.pre_layrnorm", x, numbers[1])  # so spelt in the files
        x = _tower(weights, "vision_model", x, numbers, causal=False)
        return _unit(weights["visual_projection.weight"] @ _norm(weights, "vision_model.post_layernorm", x[0], numbers[1]))


def _tower(
    weights: Weights, name: str, x: Float[Array, "n d"], numbers: tuple[int, float, str], causal: bool
) -> Float[Array, "n d"]:
    heads, eps, activation = numbers
    act = {"quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x), "gelu": partial(jax.nn.gelu, approximate=False)}[activation]
    layer = 0
    while f"{name}.encoder.layers.{layer}.layer_norm1.weight" in weights:
        at = f"{name}.encoder.layers.{layer}."
        y = _norm(weights, f"{at}layer_norm1", x, eps)
        q, k, v = (_linear(weights, f"{at}self_attn.{part}_proj", y).reshape(len(x), heads, -1) for part in "qkv")
        y = jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=causal)[0].reshape(x.shape)
        x = x + _linear(weights, f"{at}self_attn.out_proj", y)
        y = act(_linear(weights, f"{at}mlp.fc1", _norm(weights, f"{at}layer_norm2", x, eps)))
        x = x + _linear(weights, f"{at}mlp.fc2", y)
        layer += 1
    return x


def _linear(weights: Weights, name: str, x: Array) -> Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: Weights, name: str, x: Array, eps: float) -> Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps)
    return centred * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _unit(x: Float[Array, " e"]) -> Float[Array, " e"]:
    return x / jnp.linalg.norm(x)
