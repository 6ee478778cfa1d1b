"""Text to token ids, as transformers' tokenizers make them, through the `tokenizers` library alone.

tokenizer.json                               the whole tokenizer, as most folders have it
vocab.json, merges.txt                       only its numbers (FLUX.1's CLIP, Qwen-Image): the rest is known by its class
tokenizer_config.json                        the class, the padding and the added tokens
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from smartdiff_jax.errors import CheckpointError

# What one token of text may be made of, before any merges; as the two models were trained with.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_QWEN2_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokenize(
    tokenizer: Tokenizer, text: str, max_length: int, pad_id: int, pad_to: int | None = None
) -> tuple[Int[np.ndarray, "1 l"], int, int]:
    """Token ids int32 [1, l] of one text, how many there were before truncation, and how many of the ids are no padding.

    Truncated to `max_length` behind the text's own tokens: those the tokenizer puts around a text are kept, and counted.
    Padded on the right to `pad_to` (None: not at all). The tokenizer is left as it was, so threads may share it.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    num_special = tokenizer.num_special_tokens_to_add(False)
    num_tokens = len(encoding.ids) + num_special
    encoding.truncate(max_length - num_special)
    found = tokenizer.post_process(encoding).ids
    ids = np.full((1, len(found) if pad_to is None else pad_to), pad_id, np.int32)
    ids[0, : len(found)] = found
    return ids, num_tokens, len(found)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The checkpoint's own tokenizer, without its padding and truncation settings. Raises CheckpointError."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; the folder must hold the tokenizer in its fast form (tokenizer.json)")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for anything it cannot parse
        raise CheckpointError(f"{file} is not a tokenizer: {error}; download it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def find_pad_id(folder: Path, default: int | None = None) -> int:
    """Id of the padding token that tokenizer_config.json (or special_tokens_map.json) names.

    default: where neither names one. Raises CheckpointError where there is no default either.
    """
    token = _special_token(folder, "pad_token")
    if token is None:
        if default is None:
            raise CheckpointError(f"{folder / 'tokenizer_config.json'} names no pad_token; download the folder again")
        return default
    found = load_tokenizer(folder).token_to_id(token)
    if found is None:
        raise CheckpointError(f"{folder}: the pad_token {token!r} is not in the vocabulary; download the folder again")
    return found


def _special_token(folder: Path, name: str) -> str | None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_json(folder / file).get(name)
        if token is not None:
            return token["content"] if isinstance(token, dict) else token
    return None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}; download it again") from None
