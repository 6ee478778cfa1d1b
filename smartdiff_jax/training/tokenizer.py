"""A word tokenizer made from the training captions, saved as an ordinary `tokenizer.json`.

Lower-cased words and punctuation are tokens of their own (the text path of a small model learns words at once, and never
learned spelling in our trials). A word outside the vocabulary is cut greedily into the longest known beginning and known
characters (the WordPiece rule), so any text has tokens. <pad> is 0 always. A `SENTENCE` is made as T5 makes it: </s> 1 appended
to every text, <unk> 2 for a character never seen. A `CHAT` comes in a template, whose line breaks are tokens and whose turns
begin and end with special ones: Qwen-Image's opens with the 34 tokens it has by Qwen's own tokenizer.
"""

import dataclasses
import string
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from smartdiff_jax.errors import InvalidConfig

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
CONTINUATION = "##"


@dataclasses.dataclass(frozen=True)
class TokenizerStyle:
    """special: tokens, by id. end: the one that ends a text. appended: `end` is put behind every text.
    blanks: what separates words and is no token."""

    special: tuple[str, ...]
    end: str
    appended: bool
    blanks: str


SENTENCE = TokenizerStyle((PAD, EOS, UNK), end=EOS, appended=True, blanks=r"\s+")
CHAT = TokenizerStyle((PAD, UNK, TURN, END_OF_TURN), end=END_OF_TURN, appended=False, blanks=r"[^\S\n]+")


def build_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int, style: TokenizerStyle = SENTENCE) -> Tokenizer:
    """The `vocab_size` most frequent words of `texts`, behind the special tokens and single characters.

    max_length: texts are cut to this many tokens, `</s>` included. The vocabulary is smaller if there are fewer words, and
    the same for the same texts in any order. Raises InvalidConfig if not even the characters fit.
    """
    tokenizer = Tokenizer(models.WordPiece(vocab={UNK: 0}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]  # café -> cafe
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        # words keep their hyphens and apostrophes ("x-ray", "4 o'clock"); other punctuation stands alone
        [pre_tokenizers.Split(Regex(style.blanks), "removed"), pre_tokenizers.Split(Regex(r"[^\w'-]"), "isolated")]
    )

    counts: Counter[str] = Counter()
    for text, number in Counter(texts).items():
        for token in style.special:
            text = text.replace(token, " ")
        text = tokenizer.normalizer.normalize_str(text)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text):
            counts[word] += number
    fixed = [*style.special, *CHARACTERS, *(CONTINUATION + character for character in CHARACTERS)]
    if vocab_size < len(fixed):
        raise InvalidConfig("vocab_size", vocab_size, f"give at least {len(fixed)}, for the single characters")
    words = sorted(counts.keys() - set(fixed), key=lambda word: (-counts[word], word))
    vocab = {token: index for index, token in enumerate([*fixed, *words][:vocab_size])}

    tokenizer.model = models.WordPiece(
        vocab=vocab, unk_token=UNK, continuing_subword_prefix=CONTINUATION, max_input_chars_per_word=64
    )
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION, cleanup=False)
    if style.appended:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {style.end}", pair=f"$A {style.end} $B {style.end}", special_tokens=[(style.end, vocab[style.end])]
        )
    tokenizer.add_special_tokens(list(style.special))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length, pad_id=vocab[PAD], pad_token=PAD)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Int[np.ndarray, "n l"]:
    """Token ids of `texts`, padded with 0 to the tokenizer's length; the library spreads the work over its threads."""
    return np.array([encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))], np.int32)


def tokenizer_config(max_length: int, style: TokenizerStyle) -> dict[str, object]:
    """What goes into `tokenizer_config.json`, with the field names of transformers."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "pad_token": PAD,
        "eos_token": style.end,
        "unk_token": UNK,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
