"""A thousand texts that tokenizers get wrong, the same wherever they are made; shared by a test and golden/make_tokenizers.py.

Drawn with RandomState, whose streams NumPy promises never to change.
"""

import numpy as np

NUM_STRINGS = 1000

WORDS = (
    "a the cat Dog HOUSE photograph of astronaut's riding horses, snow-covered mountains; don't we'll THEY'RE I'm o'clock "
    "42 3.14 1,000,000 2048px 4K f/1.8 #hashtag @user e-mail@example.org https://example.org/a?b=c&d=%20 C++ x^2 (parentheses) "
    "naïve café Ærøskøbing Straße STRASSE İstanbul ıi ǅ ﬁne ﬂow ＦＵＬＬ ｗｉｄｔｈ １２３ Ⅻ ½ ² ™ ㎏ ㌔ "
    "Привет мир Ελλάδα ΣΟΦΟΣ Ἀθῆναι Հայերեն ქართული "
    "一只 猫 在 月球 上 漢字かな交じり文 カタカナ ﾊﾝｶｸ 한국어 안녕하세요 "
    "שלום עולם שָׁלוֹם مرحبا بالعالم مُحَمَّد ١٢٣ فارسی\u200cها نمونه\u200e "
    "नमस्ते दुनिया தமிழ் ไทยแลนด์ ພາສາລາວ አማርኛ བོད་ཡིག မြန်မာ"
).split(" ")
EMOJI = (
    "😀 🎨 👩\u200d🚀 👨\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🇩🇪 🇨🇳🇯 👍🏽 ❤\ufe0f ☺ 1\ufe0f\u20e3 🫠 ✨✨ ©\ufe0f"
).split(" ")
SPACES = [" "] * 6 + ["", "  ", "\n\n", " \n ", "\r\n", *"\t\n\v\f\u0085\u00a0\u2009\u200b\u2028\u3000"]
MARKS = [*"\u0301\u0308\u0327\u0489\u05bc\u0651\u093f\u0e49\u20dd", "\u0323\u0307", "\u0307\u0323"]
CONTROLS = [*"\x00\x01\x07\x08\x1b\x1f\x7f\x80\x9f\xad\u061c\u200b\u200d\u200e\u202e\u2060\u2066\ue000\ufeff\ufffc\ufffd\ufffe"]
CONTROLS += ["\U000e0041", "\U0010ffff"]
LOOKALIKES = (
    "<|endoftext|> <|startoftext|> <|ENDOFTEXT|> <|STARTOFTEXT|> a<|StartOfText|>b <|endoftext endoftext|> </s> <s> <pad> "
    "<unk> <extra_id_0> <extra_id_99> <extra_id_100> <|im_start|> <|im_end|> <|IM_END|> <|im_start <|vision_start|> <think> "
    "</think> <tool_call> <0x0A> </w> a</w> ▁ ▁a Ġ Ċ ##a [CLS]"
).split(" ") + ["<| endoftext |>", "< /s>"]
BLOCKS = [
    (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF), (0x1100, 0x11FF),
    (0x1E00, 0x1FFF), (0x2000, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF),
    (0xFE00, 0xFFEF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0x0, 0xD7FF), (0xE000, 0x10FFFF),
]  # fmt: skip
EDGES = [
    "", " ", "   ", "\n", "\t \n", "a", "A", " a", "a ", "  a  b  ", "'", "'s", "'S", "it's IT'S 'Tis ''", "\u00a0", "\u3000",
    "\x00", "\u200b", "\ufeffa", "\u00e9", "e\u0301", "\u0301", "ﬁ", "ﬃ", "İ", "ß", "Σ", "ΑΣ ΑΣ.", "\uac01",
    "\u1100\u1161\u11a8", "\u212b", "\u00c5", "...", "!!!", "?!", "\\n", "a\\b", '"quoted"', "{}", "$$$", "0", "00",
    "0123456789", "1 2 3", "a1b2c3", "a_b", "--", "—", "“”", "…", "猫", "猫猫猫", "猫 猫", "こんにちは、世界！",
    "שלום, עולם!", "مرحبا، بالعالم؟", "\u202eabc\u202c", "👩\u200d🚀", "🇩🇪🇫🇷", "👍🏽👍",
    "<|im_start|>system\nDescribe the image.<|im_end|>\n<|im_start|>user\n一只猫<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    *LOOKALIKES,
]  # fmt: skip


def strings() -> list[str]:
    """NUM_STRINGS texts without lone surrogates: edges first, then drawn ones, every 25th of them some thousand characters."""
    rng = np.random.RandomState(77)

    def pick(pool):
        return pool[rng.randint(len(pool))]

    def characters():
        low, high = pick(BLOCKS)
        return "".join(chr(rng.randint(low, high + 1)) for _ in range(rng.randint(1, 9)))

    def marked():
        return "".join(letter + pick(MARKS) * rng.randint(3) for letter in pick(WORDS))

    def plain():
        return pick(WORDS)

    makers = (
        [plain],
        [plain, plain, lambda: pick(EMOJI)],
        [characters],
        [plain, lambda: pick(LOOKALIKES)],
        [marked, lambda: pick(CONTROLS)],
        [plain, characters, marked, *(lambda pool=pool: pick(pool) for pool in (EMOJI, CONTROLS, LOOKALIKES, SPACES))],
    )
    found = list(EDGES)
    while len(found) < NUM_STRINGS:
        pieces = makers[len(found) % len(makers)]
        count = rng.randint(500, 900) if len(found) % 25 == 0 else rng.randint(1, 16)
        found.append("".join(pick(pieces)() + pick(SPACES) for _ in range(count)))
    return found
