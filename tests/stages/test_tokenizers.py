"""Token ids against transformers (golden/make_tokenizers.py): a thousand odd texts, three kinds of tokenizer."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny_strings

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.stages.tokenize import find_pad_id, load_tokenizer, tokenize

GOLDEN = Path(__file__).parents[1] / "golden"
STRINGS = tiny_strings.strings()
# max_length and pad_to, as the pipelines of FLUX.1 (clip, t5) and Qwen-Image call their tokenizers.
CALLS = {"clip": (77, 77), "t5": (512, 512), "qwen2": (1024, None)}
PAD = {"clip": "<|endoftext|>", "t5": "<pad>", "qwen2": "<|endoftext|>"}


def folder_of(kind):
    return GOLDEN / "tokenizers" / kind


def golden_of(kind):
    with np.load(GOLDEN / f"tokens_{kind}.npz") as file:
        golden = dict(file)
    assert zlib.crc32("\0".join(STRINGS).encode()) == golden["crc"], "the strings changed; run make_tokenizers.py again"
    return golden


def check_ids(folder, kind):
    golden, tokenizer = golden_of(kind), load_tokenizer(folder)
    max_length, pad_to = CALLS[kind]
    pad_id = find_pad_id(folder)
    assert pad_id == golden["pad_id"]
    for index, text in enumerate(STRINGS):
        ids, num_tokens, length = tokenize(tokenizer, text, max_length, pad_id, pad_to)
        expected = golden["ids"][golden["offsets"][index] : golden["offsets"][index + 1]]
        assert ids.dtype == np.int32 and ids.tolist() == [expected.tolist()], repr(text)
        assert (num_tokens, length) == (golden["num_tokens"][index], golden["lengths"][index]), repr(text)


def write_apart(kind, target, **changes):
    """The tokenizer as FLUX.1 and Qwen-Image ship theirs: without a tokenizer.json."""
    written = json.loads((folder_of(kind) / "tokenizer.json").read_text("utf-8"))
    config = json.loads((folder_of(kind) / "tokenizer_config.json").read_text("utf-8"))
    config["added_tokens_decoder"] = {str(token.pop("id")): token for token in written["added_tokens"]}
    (target / "vocab.json").write_text(json.dumps(written["model"]["vocab"]), "utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in written["model"]["merges"])]
    (target / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    (target / "tokenizer_config.json").write_text(json.dumps(config | changes), "utf-8")
    return target


@pytest.mark.parametrize("kind", CALLS)
def test_ids_equal_transformers(kind):
    check_ids(folder_of(kind), kind)


@pytest.mark.parametrize("kind", ["clip", "qwen2"])
def test_vocabulary_and_merges_make_the_same_tokenizer(kind, tmp_path):
    check_ids(write_apart(kind, tmp_path), kind)


@pytest.mark.parametrize("kind", CALLS)
def test_the_strings_put_tokenizers_to_the_test(kind):
    golden = golden_of(kind)
    truncated = golden["num_tokens"] > golden["lengths"]
    assert len(STRINGS) == tiny_strings.NUM_STRINGS and len(set(STRINGS)) > 950
    assert truncated.sum() >= 30 and (~truncated).sum() >= 500
    assert len(np.unique(golden["ids"])) > golden["vocab_size"] / 2


def test_truncation_keeps_the_tokens_around_the_text():
    clip, t5 = load_tokenizer(folder_of("clip")), load_tokenizer(folder_of("t5"))
    text = "the cat " * 400
    ids, num_tokens, length = tokenize(clip, text, 77, 0)
    start, end = (clip.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>"))
    assert ids.shape == (1, 77) and length == 77 and num_tokens > 400
    assert ids[0, 0] == start and ids[0, -1] == end and end not in ids[0, :-1]
    ids, _, length = tokenize(t5, text, 20, 0, pad_to=32)
    assert ids[0, 19] == t5.token_to_id("</s>") and length == 20 and not ids[0, 20:].any()


def test_no_text():
    ids, num_tokens, length = tokenize(load_tokenizer(folder_of("qwen2")), "", 1024, 7)
    assert ids.shape == (1, 0) and (num_tokens, length) == (0, 0)
    ids, num_tokens, length = tokenize(load_tokenizer(folder_of("qwen2")), "", 1024, 7, pad_to=3)
    assert ids.tolist() == [[7, 7, 7]] and (num_tokens, length) == (0, 0)


def test_settings_in_the_file_change_nothing(tmp_path):
    tokenizer = load_tokenizer(folder_of("t5"))
    expected = tokenize(tokenizer, "a cat on the moon", 512, 0)[0]
    tokenizer.enable_padding(length=40)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenize(load_tokenizer(tmp_path), "a cat on the moon", 512, 0)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("kind", CALLS)
def test_padding_is_the_token_the_folder_names(kind, tmp_path):
    shutil.copytree(folder_of(kind), tmp_path, dirs_exist_ok=True)
    expected = load_tokenizer(tmp_path).token_to_id(PAD[kind])
    assert find_pad_id(tmp_path) == find_pad_id(tmp_path, default=12345) == expected
    # transformers 4 may write the token as an object, or in the other file.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": PAD[kind], "lstrip": False}}))
    assert find_pad_id(tmp_path) == expected
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": None}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": PAD[kind]}))
    assert find_pad_id(tmp_path) == expected


def test_a_folder_without_padding(tmp_path):
    shutil.copy(folder_of("t5") / "tokenizer.json", tmp_path)
    with pytest.raises(CheckpointError, match="names no pad_token"):
        find_pad_id(tmp_path)
    assert find_pad_id(tmp_path, default=0) == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    with pytest.raises(CheckpointError, match=r"'\[PAD\]' is not in the vocabulary"):
        find_pad_id(tmp_path, default=0)


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="does not hold a tokenizer"):
        load_tokenizer(tmp_path)
    shutil.copy(folder_of("t5") / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        find_pad_id(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer_class": "GPT2Tokenizer"}, "tokenizer_class GPT2Tokenizer without a tokenizer.json"),
        ({"added_tokens_decoder": {}}, "no added_tokens_decoder"),
        ({"added_tokens_decoder": {"900": {"content": "<new>", "special": True}}}, "leaves no room for token 900"),
    ],
)
def test_vocabularies_that_do_not_add_up_are_refused(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(write_apart("qwen2", tmp_path, **changes))


def test_clip_needs_its_end_token(tmp_path):
    with pytest.raises(CheckpointError, match="names no eos_token"):
        load_tokenizer(write_apart("clip", tmp_path, eos_token=None))
