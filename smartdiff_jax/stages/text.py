"""Prompts to what the model is told of them: one branch or two, each through every text encoder the model has."""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.models.text.source import TextSource
from smartdiff_jax.stages.base import jit_in
from smartdiff_jax.stages.tokenize import tokenize
from smartdiff_jax.weights.residency import Held

KEPT_BYTES = 64 << 20
"""Of states an encoder keeps on the device, the last used: 16 prompts of Wan's. The same negative prompt comes every time."""


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """What the branches of guidance are told, positive first.

    text: states [n, 1, l, d] in the model's dtype. text_length: int32 [n, 1], how many count (None: all).
    pooled: [n, 1, e]. notes: what the user should know.
    """

    text: Float[Array, "n 1 l d"]
    text_length: Int[np.ndarray, "n 1"] | None
    pooled: Float[Array, "n 1 e"] | None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Branch:
    """One branch of guidance: a prompt under the name of its field, or states [1, l, d] and [1, e] the caller brings."""

    field: str
    prompt: str
    embeds: Any = None
    pooled_embeds: Any = None


def text_states(source: TextSource, encoder: Any, ids: Int[Array, "b l"], mask: Int[Array, "b l"]) -> Array:
    """What a model is told of token ids whose `mask` is 1: states [b, l - skip, d], or pooled [b, e]."""
    kwargs = {} if source.layers is None else {"layers": source.layers}
    states = encoder(ids, jnp.ones_like(mask) if source.attend_padding else mask, **kwargs)
    if source.zero_padding:
        states = states * mask[:, :, None].astype(states.dtype)
    return states[:, source.skip :] if source.field == "text" else states


class PromptEncoder:
    """One tokenizer and encoder. Prompts are padded to few lengths, so few executables serve all."""

    def __init__(self, source: TextSource, tokenizer: Tokenizer, pad_id: int, graphdef: Any, weights: Held, dtype: Any):
        self.source = source
        self._tokenizer, self._pad_id, self._weights = tokenizer, pad_id, weights
        self._kept: OrderedDict[tuple[bytes, int], Array] = OrderedDict()
        self._lock = threading.Lock()

        def encode(weights, ids, mask):
            with jax.named_scope("text"):
                return text_states(source, nnx.merge(graphdef, weights), ids, mask).astype(dtype)

        self._encode = jit_in(dtype, encode)

    @cached_property
    def dim(self) -> int:
        """Width of the states. To know it, the encoder is traced; only states that a caller brings are held against it."""
        ids = jax.ShapeDtypeStruct((1, self.source.max_length), jnp.int32)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._weights.kept)
        return jax.eval_shape(self._encode, shapes, ids, ids).shape[-1]

    def tokenize(self, prompt: str) -> tuple[Int[np.ndarray, "1 l"], int]:
        """Token ids without padding, and how many there were before anything was cut off."""
        ids, found, length = tokenize(self._tokenizer, self.source.prompt(prompt), self.source.max_length, self._pad_id)
        return ids[:, :length], found

    def __call__(self, ids: Int[np.ndarray, "1 l"], padded: int) -> Array:
        """States [1, padded, d], or pooled [1, e]; of prompts that came before, from memory."""
        key = ids.tobytes(), padded
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        states = self._run(ids, padded)
        with self._lock:
            self._kept[key] = states
            while sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return states

    def forget(self) -> None:
        """Encode prompts anew that came before."""
        with self._lock:
            self._kept.clear()

    def _run(self, ids: Int[np.ndarray, "1 l"], padded: int) -> Array:
        total = padded + self.source.skip
        mask = np.zeros((1, total), np.int32)
        mask[:, : ids.shape[1]] = 1
        wide = np.pad(ids, ((0, 0), (0, total - ids.shape[1])), constant_values=self._pad_id)
        with self._weights.use() as weights:
            return self._encode(weights, wide, mask).block_until_ready()


class TextEncode:
    """All text encoders of one model, by the field they fill."""

    def __init__(self, encoders: Sequence[PromptEncoder], dtype: Any):
        self._encoders: Mapping[str, PromptEncoder] = {encoder.source.field: encoder for encoder in encoders}
        self._dtype = dtype

    def __call__(self, branches: Sequence[Branch]) -> EncodedText:
        """Encode. Raises InvalidRequest for states that do not fit the model."""
        notes: list[str] = []
        encoder = self._encoders["text"]
        source = encoder.source
        found: list[np.ndarray] = []
        for branch in branches:
            if branch.embeds is None:
                ids, total = encoder.tokenize(branch.prompt)
                if total > ids.shape[1]:
                    most = source.max_length - source.skip
                    notes.append(
                        f"{branch.field} has {total - source.skip} tokens; the encoder takes {most}, the rest was cut off"
                    )
                found.append(ids)
            else:
                found.append(
                    check_embeds(f"{branch.field}_embeds", branch.embeds, encoder.dim, source.max_length - source.skip)
                )
        lengths = [
            max(1, item.shape[1] - (source.skip if branch.embeds is None else 0))
            for item, branch in zip(found, branches, strict=True)
        ]
        padded = source.padded_length(max(lengths))
        states = [
            encoder(item, padded) if branch.embeds is None else self._padded(item, padded)
            for item, branch in zip(found, branches, strict=True)
        ]
        return EncodedText(
            text=jnp.stack(states),
            text_length=np.array(lengths, np.int32)[:, None] if source.buckets else None,
            pooled=self._pooled(branches),
            notes=tuple(notes),
        )

    def forget(self) -> None:
        """Encode prompts anew that came before."""
        for encoder in self._encoders.values():
            encoder.forget()

    def _padded(self, embeds: np.ndarray, length: int) -> Array:
        return jnp.asarray(np.pad(embeds, ((0, 0), (0, length - embeds.shape[1]), (0, 0))), self._dtype)

    def _pooled(self, branches: Sequence[Branch]) -> Array | None:
        encoder = self._encoders.get("pooled")
        if encoder is None:
            for branch in branches:
                if branch.pooled_embeds is not None:
                    raise InvalidRequest("pooled_prompt_embeds", "given", "this model has no pooled text encoder; leave it out")
            return None
        vectors = []
        for branch in branches:
            if branch.pooled_embeds is not None:
                vector = np.asarray(branch.pooled_embeds, np.float32)
                if vector.shape != (1, encoder.dim):
                    raise InvalidRequest("pooled_prompt_embeds", vector.shape, f"must be shaped (1, {encoder.dim})")
                vectors.append(jnp.asarray(vector, self._dtype))
            elif branch.embeds is not None:
                raise InvalidRequest(
                    "pooled_prompt_embeds", None, "goes with prompt_embeds for this model; pass both or neither"
                )
            else:
                ids, _ = encoder.tokenize(branch.prompt)
                vectors.append(encoder(ids, encoder.source.padded_length(ids.shape[1])))
        return jnp.stack(vectors)


def check_embeds(name: str, embeds: object, text_dim: int, max_length: int) -> Float[np.ndarray, "1 l d"]:
    """Text states a caller brings: [1, l, d] with l at most `max_length`."""
    array = np.asarray(embeds, dtype=np.float32)
    if array.ndim != 3 or array.shape[0] != 1 or array.shape[2] != text_dim or not 0 < array.shape[1] <= max_length:
        raise InvalidRequest(name, array.shape, f"must be shaped (1, length <= {max_length}, {text_dim})")
    return array
