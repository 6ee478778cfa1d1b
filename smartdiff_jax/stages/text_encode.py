"""Prompts to text states."""

import dataclasses
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from tokenizers import Tokenizer

from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.models.text.prompts import wan as clean_prompt
from smartdiff_jax.stages.base import jit_in
from smartdiff_jax.stages.tokenize import load_tokenizer as load_tokenizer


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """states [1, l, d], zero behind the prompt's own tokens; num_tokens counts those before any truncation."""

    states: Float[Array, "1 l d"]
    num_tokens: int
    truncated: bool


class TextEncode:
    """Tokenizer and encoder of one model; every prompt is padded to `max_length`, so one executable serves all."""

    def __init__(self, tokenizer: Tokenizer, graphdef: Any, weights: Any, max_length: int, pad_id: int, dtype: Any):
        self._tokenizer, self._weights = tokenizer, weights
        self.max_length, self._pad_id = max_length, pad_id

        def encode(weights, ids, mask):
            states = nnx.merge(graphdef, weights)(ids, mask)
            return states * mask[:, :, None].astype(states.dtype)

        self._encode = jit_in(dtype, encode)

    def __call__(self, prompt: str) -> EncodedText:
        """Clean, tokenize, truncate to `max_length` (end token kept) and encode."""
        encoding = self._tokenizer.encode(clean_prompt(prompt))
        num_tokens = len(encoding.ids)
        encoding.truncate(self.max_length)
        ids = np.full((1, self.max_length), self._pad_id, np.int32)
        ids[0, : len(encoding.ids)] = encoding.ids
        if num_tokens > self.max_length:
            # The end token closes a truncated prompt too, as transformers' tokenizers do it.
            ids[0, -1] = self._tokenizer.encode("").ids[-1]
        mask = np.zeros((1, self.max_length), np.int32)
        mask[0, : len(encoding.ids)] = 1
        return EncodedText(self._encode(self._weights, ids, mask), num_tokens, num_tokens > self.max_length)


def check_embeds(name: str, embeds: object, text_dim: int, max_length: int) -> np.ndarray:
    """Text states a caller brings: [1, l, d] with l at most `max_length`; zero-padded to it, as the model's own are."""
    array = np.asarray(embeds, dtype=np.float32)
    if array.ndim != 3 or array.shape[0] != 1 or array.shape[2] != text_dim or not 0 < array.shape[1] <= max_length:
        raise InvalidRequest(name, array.shape, f"must be shaped (1, length <= {max_length}, {text_dim})")
    return np.pad(array, ((0, 0), (0, max_length - array.shape[1]), (0, 0)))
