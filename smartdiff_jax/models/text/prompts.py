"""Prompts as every pipeline of diffusers hands them to its tokenizer: pure functions of the user's text.

Qwen3's chat template, with one message of the user and the assistant's turn opened, comes down to a prefix and a suffix;
the message itself is not touched (test_prompts.py holds both against the published template).
"""

import html

import ftfy

_USER = "<|im_start|>user\n"
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
_NO_THINKING = "<think>\n\n</think>\n\n"

_QWEN_IMAGE_SYSTEM = (
    "<|im_start|>system\n"
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n"
)

QWEN_IMAGE_SKIP = 34
"""Tokens that Qwen-Image's template puts before the prompt, by Qwen2.5-VL's tokenizer: encoded as context, their states
dropped. A number upstream too: it stays 34 where a prompt's first characters merge with the template's last."""


def plain(prompt: str) -> str:
    """The prompt as it is (FLUX.1)."""
    return prompt


def wan(prompt: str) -> str:
    """Mend broken unicode, undo HTML escapes, and make every run of white space one space (as upstream's pipeline does)."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return " ".join(text.split())


def flux2_klein(prompt: str) -> str:
    """Qwen3's chat template with thinking off: the assistant's turn begins with an empty thought."""
    return _USER + prompt + _ASSISTANT + _NO_THINKING


def z_image(prompt: str) -> str:
    """Qwen3's chat template with thinking on, which adds nothing: the thought would be the assistant's to write."""
    return _USER + prompt + _ASSISTANT


def qwen_image(prompt: str) -> str:
    """A system message that asks for a description of the picture, then the prompt as the user's message."""
    return _QWEN_IMAGE_SYSTEM + _USER + prompt + _ASSISTANT
