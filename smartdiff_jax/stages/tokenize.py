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
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

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
    apart = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not file.is_file() and not apart:
        raise CheckpointError(f"{file} is missing, and so are vocab.json and merges.txt; download the tokenizer again")
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else _from_merges(folder)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception for anything it cannot parse
        raise CheckpointError(f"{folder} does not hold a tokenizer: {error}; download it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def find_pad_id(folder: Path, default: int | None = None) -> int:
    """Id of the padding token that tokenizer_config.json (or special_tokens_map.json) names.

    default: where neither names one. Raises CheckpointError where there is no default either.
    """
    if default is not None and _special_token(folder, "pad_token") is None:
        return default
    return _special_entry(load_tokenizer(folder), folder, "pad_token")[1]


def _from_merges(folder: Path) -> Tokenizer:
    """A byte-pair tokenizer whose normaliser, word split and template are those of its class."""
    config = folder / "tokenizer_config.json"
    settings = _read_json(config)
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if kind not in _BYTE_PAIR:
        raise CheckpointError(f"{config}: tokenizer_class {kind} without a tokenizer.json is not served; save it as one")
    added = sorted((int(index), token) for index, token in settings.get("added_tokens_decoder", {}).items())
    if not added:
        raise CheckpointError(f"{config}: no added_tokens_decoder, which vocab.json needs; download the folder again")
    tokenizer = _BYTE_PAIR[kind](folder)
    for index, token in added:
        add = tokenizer.add_special_tokens if token["special"] else tokenizer.add_tokens
        add([AddedToken(**token)])
        if tokenizer.token_to_id(token["content"]) != index:
            raise CheckpointError(f"{config}: vocab.json leaves no room for token {index}; download the folder again")
    return tokenizer


def _clip(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(_byte_pairs(folder, end_of_word_suffix="</w>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_CLIP_WORDS), "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    end, start = (_special_entry(tokenizer, folder, name) for name in ("eos_token", "bos_token"))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return tokenizer


def _qwen2(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(_byte_pairs(folder))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    return tokenizer


_BYTE_PAIR = {"CLIPTokenizer": _clip, "Qwen2Tokenizer": _qwen2}


def _byte_pairs(folder: Path, **options: Any) -> models.BPE:
    return models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), **options)


def _special_entry(tokenizer: Tokenizer, folder: Path, name: str) -> tuple[str, int]:
    """The token that the folder names for a purpose, and its id. Raises CheckpointError."""
    token = _special_token(folder, name)
    if token is None:
        raise CheckpointError(f"{folder / 'tokenizer_config.json'} names no {name}; download the folder again")
    found = tokenizer.token_to_id(token)
    if found is None:
        raise CheckpointError(f"{folder}: the {name} {token!r} is not in the vocabulary; download the folder again")
    return token, found


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
