"""Which text a model is told, and how it comes about: prompt -> template -> token ids -> encoder -> states."""

import dataclasses
from collections.abc import Callable
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TextSource:
    """One tokenizer and encoder of a checkpoint folder, and what the model takes from it.

    field: what of `Conditioning` it fills.
    prompt: the user's text to what is tokenized.
    max_length: tokens at most, those of the template included; the rest is cut off.
    skip: leading tokens of the template, encoded and then dropped.
    layers: hidden states that are taken and set side by side (None: the encoder has one output).
    attend_padding: the encoder sees the padding as text.
    zero_padding: states of the padding are zeroed.
    buckets: padded to the smallest of these lengths that holds the prompt, and the model is told how much counts;
        () pads to max_length, and all of it counts.
    """

    prompt: Callable[[str], str]
    max_length: int
    field: Literal["text", "pooled"] = "text"
    tokenizer: str = "tokenizer"
    encoder: str = "text_encoder"
    skip: int = 0
    layers: tuple[int, ...] | None = None
    attend_padding: bool = False
    zero_padding: bool = False
    buckets: tuple[int, ...] = ()

    def padded_length(self, length: int) -> int:
        """To how many states `length` of them are padded."""
        whole = self.max_length - self.skip
        return next((bucket for bucket in self.buckets if bucket >= length), whole) if self.buckets else whole
