"""Makes tokenizers/ and tokens_*.npz with transformers (run where transformers and sentencepiece are).

Three small tokenizers of the kinds that the models bring, trained on the few lines below and saved by transformers:
tokenizer.json and tokenizer_config.json are kept. Then the ids that transformers gives for the strings of tiny_strings.py,
padded and truncated as the pipelines do it. CLIP and Qwen2 are also read back from vocab.json and merges.txt, as FLUX.1 and
Qwen-Image ship them: that must give the same ids. (Trainers break ties at random, so another run makes other tokenizers.)
"""

import io
import json
import shutil
import sys
import tempfile
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AddedToken, CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny_strings  # noqa: E402

CORPUS = """
A photograph of an astronaut riding a horse on the moon, with the earth in the background, highly detailed.
The quick brown fox jumps over the lazy dog while the cats are sleeping under the old house near the river.
We'll paint what they've seen: it's a snow-covered mountain, isn't it? I'm sure she'd say they're beautiful.
Two dogs and three birds were walking through the green forest in the morning light; the water was very cold.
In 2048 there will be 1,000,000 robots (and 42 cats) at https://example.org/a?b=c - e-mail us @ noon, 100% free!
An oil painting of a small red boat on the blue sea, painted in the style of the old masters, 4k, cinematic.
Le café naïf près de la forêt était déjà fermé; l'été, les élèves étudient à l'étranger avec leurs frères.
Die Straße führt über die Brücke zu den schönen Häusern, wo früher ein großer Garten war.
Привет мир, это красивая картина, на которой кошка сидит на окне и смотрит на снег.
Η Ελλάδα είναι μια όμορφη χώρα με πολλά νησιά και τη θάλασσα γύρω της.
一只猫在月球上骑着马，背景是地球，画面非常精美。 一个女孩在花园里看书，阳光很好。
漢字かな交じり文のテストです。 猫が窓のそばで寝ています。 カタカナも少しあります。
안녕하세요 세계, 고양이가 창문 옆에서 자고 있습니다. 한국어 문장입니다.
שלום עולם, החתול ישן ליד החלון והילדים משחקים בגן.
مرحبا بالعالم، القطة تنام بجانب النافذة والأطفال يلعبون في الحديقة.
नमस्ते दुनिया, बिल्ली खिड़की के पास सो रही है।
ไทยแลนด์ แมวนอนอยู่ข้างหน้าต่าง 😀 🎨 ✨ 👍 ❤️
""".strip().split("\n")

QWEN2_SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|>".split()
QWEN2_ADDED = "<tool_call> </tool_call> <think> </think>".split()

# How each pipeline calls its tokenizer (FLUX.1's two, Qwen-Image's).
CALLS = {
    "clip": dict(padding="max_length", max_length=77, truncation=True),
    "t5": dict(padding="max_length", max_length=512, truncation=True),
    "qwen2": dict(padding=False, max_length=1024, truncation=True),
}
CLASSES = {"clip": CLIPTokenizer, "t5": T5Tokenizer, "qwen2": Qwen2Tokenizer}


def merges_of(like, num_merges: int, suffix: str) -> list[tuple[str, str]]:
    """Byte-pair merges of the corpus, split into words and bytes as a transformers tokenizer does it."""
    ending = {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = Tokenizer(models.BPE(**ending))
    tokenizer.normalizer = like.backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = like.backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3 * len(alphabet) + num_merges,
        initial_alphabet=alphabet,
        **ending,
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return merges[:num_merges]


def byte_vocabulary(merges: list[tuple[str, str]], suffix: str) -> list[str]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    with_suffix = [letter + suffix for letter in alphabet] if suffix else []
    return [*alphabet, *with_suffix, *("".join(merge) for merge in merges)]


def save_smaller(file: Path, **arrays: np.ndarray) -> None:
    """As np.savez_compressed, which knows deflate alone: integers take two thirds of that. np.load reads both."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.save(entry, array)


def make_clip() -> CLIPTokenizer:
    merges = merges_of(CLIPTokenizer(), 300, "</w>")
    tokens = [*byte_vocabulary(merges, "</w>"), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    # As FLUX.1 has it: the start token is looked for in the normalised text, so in any case of letters.
    added = {
        vocab["<|startoftext|>"]: AddedToken("<|startoftext|>", special=True, normalized=True),
        vocab["<|endoftext|>"]: AddedToken("<|endoftext|>", special=True, normalized=False),
    }
    return CLIPTokenizer(vocab=vocab, merges=merges, added_tokens_decoder=added, model_max_length=77)


def make_qwen2() -> Qwen2Tokenizer:
    merges = merges_of(Qwen2Tokenizer(), 400, "")
    vocab = {token: index for index, token in enumerate(byte_vocabulary(merges, ""))}
    added = [AddedToken(token, special=True, normalized=False) for token in QWEN2_SPECIAL]
    added += [AddedToken(token, special=False, normalized=False) for token in QWEN2_ADDED]
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        added_tokens_decoder={len(vocab) + index: token for index, token in enumerate(added)},
        eos_token="<|im_end|>",
        model_max_length=131072,
    )


def compositions() -> str:
    """Rules of sentencepiece's normaliser, a small part of its nmt_nfkc: hexadecimal characters, tab, what they become."""
    rules = {chr(code): "" for code in [*range(1, 9), 0x0E, 0x1B, 0x1F, 0x7F, 0x8F, 0x9F, 0x200B, 0x200E, 0xFEFF]}
    rules |= {chr(code): " " for code in (9, 10, 12, 13, 0xA0, 0x2009, 0x2028, 0x3000)}
    singles = [*range(0xFF01, 0xFF5F), *range(0xFB00, 0xFB05), 0xBD, 0xB2, 0x2122, 0x2026, 0x3314, 0x212B, 0x2168]
    rules |= {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in singles}
    for code in [*range(0xC0, 0x100), *range(0x386, 0x3CF), *range(0x3041, 0x30FF)]:
        apart = unicodedata.normalize("NFD", chr(code))
        if len(apart) > 1 and unicodedata.normalize("NFC", apart) == chr(code):
            rules[apart] = chr(code)

    def encoded(text):
        return " ".join(f"{ord(character):X}" for character in text)

    return "".join(f"{encoded(source)}\t{encoded(target)}\n" for source, target in sorted(rules.items()))


def make_t5(scratch: Path) -> T5Tokenizer:
    (scratch / "rules.tsv").write_text(compositions())
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=writer,
        model_type="unigram",
        vocab_size=400,
        character_coverage=0.9995,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_tsv=str(scratch / "rules.tsv"),
        minloglevel=2,
    )
    folder = scratch / "spm"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(writer.getvalue())
    return T5Tokenizer.from_pretrained(folder, model_max_length=512)


def save(kind: str, tokenizer, scratch: Path) -> Path:
    """The two files that are kept, without white space."""
    tokenizer.save_pretrained(scratch / kind)
    folder = HERE / "tokenizers" / kind
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        compact = json.dumps(json.loads((scratch / kind / name).read_text()), ensure_ascii=False, separators=(",", ":"))
        (folder / name).write_text(compact + "\n")
    return folder


def save_apart(folder: Path, target: Path) -> Path:
    """The same tokenizer as transformers 4 wrote it: vocab.json, merges.txt, and the added tokens in the config."""
    target.mkdir()
    written = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (target / "vocab.json").write_text(json.dumps(written["model"]["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in written["model"]["merges"])]
    (target / "merges.txt").write_text("\n".join(lines) + "\n")
    added = {str(token.pop("id")): token for token in written["added_tokens"]}
    (target / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    return target


def main() -> None:
    strings = tiny_strings.strings()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        made = {"clip": make_clip(), "qwen2": make_qwen2(), "t5": make_t5(scratch)}
        for kind, tokenizer in made.items():
            folder = save(kind, tokenizer, scratch)
            tokenizer = CLASSES[kind].from_pretrained(folder)
            ids = [tokenizer(text, **CALLS[kind])["input_ids"] for text in strings]
            lengths = [sum(tokenizer(text, **CALLS[kind])["attention_mask"]) for text in strings]
            whole = [len(tokenizer(text)["input_ids"]) for text in strings]
            if kind != "t5":
                apart = CLASSES[kind].from_pretrained(save_apart(folder, scratch / f"{kind}_apart"))
                assert [apart(text, **CALLS[kind])["input_ids"] for text in strings] == ids
            save_smaller(
                HERE / f"tokens_{kind}.npz",
                crc=np.uint32(zlib.crc32("\0".join(strings).encode())),
                ids=np.concatenate([np.array(row, np.int32) for row in ids]),
                offsets=np.cumsum([0, *map(len, ids)]).astype(np.int32),
                lengths=np.array(lengths, np.int32),
                num_tokens=np.array(whole, np.int32),
                pad_id=np.int32(tokenizer.pad_token_id),
                vocab_size=np.int32(len(tokenizer)),
            )
            unknown = sum(row.count(tokenizer.unk_token_id) for row in ids) if kind == "t5" else 0
            sizes = [file.stat().st_size for file in (*folder.iterdir(), HERE / f"tokens_{kind}.npz")]
            cut = sum(found > kept for found, kept in zip(whole, lengths, strict=True))
            print(f"{kind}: {len(tokenizer)} tokens, {cut} texts truncated, {unknown} unknown tokens, bytes {sizes}")
            shutil.rmtree(scratch / kind)


if __name__ == "__main__":
    main()
