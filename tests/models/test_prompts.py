"""Prompts against what upstream's pipelines hand their tokenizers.

The chat templates' literals were rendered from Qwen3's published template (jinja, as transformers renders it) for one message
of the user; Qwen-Image's is the text of diffusers' pipeline.
"""

import re

import pytest

from smartdiff_jax.models.text import prompts


@pytest.mark.parametrize(
    "prompt, text",
    [
        (
            "a red fox",
            "<|im_start|>user\na red fox<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (
            " two lines,\n{braces} <b>&amp; 狐狸\n",
            "<|im_start|>user\n two lines,\n{braces} <b>&amp; 狐狸\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        ("", "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ],
)
def test_flux2_klein_is_the_chat_template_without_thinking(prompt, text):
    assert prompts.flux2_klein(prompt) == text


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("a red fox", "<|im_start|>user\na red fox<|im_end|>\n<|im_start|>assistant\n"),
        (
            " two lines,\n{braces} <b>&amp; 狐狸\n",
            "<|im_start|>user\n two lines,\n{braces} <b>&amp; 狐狸\n<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("", "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_z_image_is_the_chat_template_with_thinking(prompt, text):
    assert prompts.z_image(prompt) == text


QWEN_IMAGE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\nHERE<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize("prompt", ["a red fox", " {braces}\n{}", ""])
def test_qwen_image_asks_for_a_description(prompt):
    assert prompts.qwen_image(prompt) == QWEN_IMAGE.replace("HERE", prompt)


def test_qwen_image_skips_what_stands_before_the_prompt():
    """Every word of the template is one token of Qwen2.5-VL's vocabulary, as is every mark, line end and special token."""
    before = prompts.qwen_image("HERE").partition("HERE")[0]
    pieces = re.findall(r"<\|\w+\|>|\n| ?\w+|[,:]", before)
    assert "".join(pieces) == before
    assert len(pieces) == prompts.QWEN_IMAGE_SKIP


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("  a red\n\n fox\t", "a red fox"),
        ("rock &amp;amp; roll", "rock & roll"),
        ("schÃ¶n", "schön"),
    ],
)
def test_wan_cleans(prompt, text):
    assert prompts.wan(prompt) == text


def test_plain_changes_nothing():
    assert prompts.plain("  a &amp; b\n") == "  a &amp; b\n"
