"""A word tokenizer made from the training captions, saved as an ordinary `tokenizer.json`.

Lower-cased words and punctuation are tokens of their own (the text path of a small model learns words at once, and never
learned spelling in our trials). A word outside the vocabulary is cut greedily into the longest known beginning and known
characters (the WordPiece rule), so any text has tokens. The special tokens are T5's: <pad> 0, </s> 1 appended to every
text, <unk> 2 for a character never seen.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from smartdiff_jax.errors import InvalidConfig

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
SPECIAL = (PAD, EOS, UNK)
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
CONTINUATION = "##"


def build_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> Tokenizer:
    """The `vocab_size` most frequent words of `captions`, behind the special tokens and single characters.

    max_length: texts are cut to this many tokens, `</s>` included. The vocabulary is smaller if there are fewer words, and
    the same for the same captions in any order. Raises InvalidConfig if not even the characters fit.
    """
    tokenizer = Tokenizer(models.WordPiece(vocab={UNK: 0}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]  # café -> cafe
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        # words keep their hyphens and apostrophes ("x-ray", "4 o'clock"); other punctuation stands alone
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w'-]"), "isolated")]
    )

    counts: Counter[str] = Counter()
    for caption, number in Counter(captions).items():
        text = tokenizer.normalizer.normalize_str(caption)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text):
            counts[word] += number
    fixed = [*SPECIAL, *CHARACTERS, *(CONTINUATION + character for character in CHARACTERS)]
    if vocab_size < len(fixed):
        raise InvalidConfig("vocab_size", vocab_size, f"give at least {len(fixed)}, for the single characters")
    words = sorted(counts.keys() - set(fixed), key=lambda word: (-counts[word], word))
    vocab = {token: index for index, token in enumerate([*fixed, *words][:vocab_size])}

    tokenizer.model = models.WordPiece(
        vocab=vocab, unk_token=UNK, continuing_subword_prefix=CONTINUATION, max_input_chars_per_word=64
    )
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION, cleanup=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, vocab[EOS])]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length, pad_id=vocab[PAD], pad_token=PAD)
    return tokenizer


def encode(tokenizer: Tokenizer, captions: Sequence[str]) -> Int[np.ndarray, "n l"]:
    """Token ids of `captions`, padded with 0 to the tokenizer's length; the library spreads the work over its threads."""
    encodings = tokenizer.encode_batch_fast([re.sub(r"\s+", " ", caption).strip() for caption in captions])
    return np.array([encoding.ids for encoding in encodings], np.int32)


def tokenizer_config(max_length: int) -> dict[str, object]:
    """What goes into `tokenizer_config.json`, with the field names of transformers."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
