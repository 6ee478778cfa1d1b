"""What training must know of a family besides its architectures: how it starts, what it costs, how its files are written."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from smartdiff_jax.training.state import Component, Params
from smartdiff_jax.training.tokenizer import TokenizerStyle

TRANSFORMER, TEXT_ENCODER = "transformer.", "text_encoder."
"""Prefixes of the two that are trained together, in one flat dictionary of parameters."""

EMBEDDING = f"{TEXT_ENCODER}embedding"

Layout = Callable[[str, np.ndarray], np.ndarray]
"""(dotted path, parameter) to the checkpoint's layout of it: a key rule's transform walked backwards."""


@dataclasses.dataclass(frozen=True)
class Trainee:
    """One family, as it is trained.

    text_width: the transformer's field, and the text encoder's, that must hold the same number.
    tokenizer: how text is cut. text: a caption to what is tokenized, equal to what the pipeline makes of the same caption.
    start: (fresh parameters of both under their prefixes, transformer, text encoder, seed) to what training starts from.
    rates: (text encoder's config) to the parameters of either that learn at another rate, and how many times the rate.
    forward_flops: (transformer's config, tokens, text tokens) to multiply-adds of one forward pass of one sample.
    classes: by component, the library, the class and the stem of the weights' file in a diffusers folder.
    layouts: by component, from its config.
    config_fields: (component, config) to the fields of its config.json behind the class's name.
    scheduler: (shift) to the fields of scheduler_config.json.
    """

    text_width: tuple[str, str]
    tokenizer: TokenizerStyle
    text: Callable[[str], str]
    start: Callable[[Params, Component, Component, int], Params]
    forward_flops: Callable[[Any, int, int], float]
    classes: Mapping[str, tuple[str, str, str]]
    layouts: Mapping[str, Callable[[Any], Layout]]
    config_fields: Callable[[str, Any], dict[str, Any]]
    scheduler: Callable[[float], dict[str, Any]]
    rates: Callable[[Any], Mapping[str, float]] = lambda config: {}


def transposed(config: Any) -> Layout:
    """Of modules whose only layout is that of a linear layer: [in, out] to [out, in]."""
    return lambda path, x: x.T if path.endswith(".kernel") else x


def causal_vae_layout(config: Any) -> Layout:
    """Of Wan's autoencoder and its relatives."""

    def layout(path: str, x: np.ndarray) -> np.ndarray:
        if path.endswith(".gamma"):
            return x.reshape(-1, 1, 1) if ".attentions." in path else x.reshape(-1, 1, 1, 1)
        if path.endswith(".kernel"):
            # 5: [h w t i o] to [o i t h w]; 4: [h w i o] to [o i h w]; 2: a 1x1 convolution
            orders = {5: (4, 3, 2, 0, 1), 4: (3, 2, 0, 1), 2: (1, 0)}
            turned = x.transpose(orders[x.ndim])
            return turned[:, :, None, None] if x.ndim == 2 else turned
        return x

    return layout
