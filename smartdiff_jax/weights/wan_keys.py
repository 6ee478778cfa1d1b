"""Names of the original Wan release to those of its diffusers release; only names differ, no number does.

    DiT   wan/modules/model.py of https://github.com/Wan-Video/Wan2.1 -> diffusers.WanTransformer3DModel
    UMT5  wan/modules/t5.py                                           -> transformers.UMT5EncoderModel
    VAE   wan/modules/vae.py                                          -> diffusers.AutoencoderKLWan

Unusual: Wan numbers a block's norms by kind and diffusers by order of use, so norm3 (before cross-attention) becomes norm2; and
diffusers groups the VAE decoder's flat list of layers by stage, three residual blocks and an upsampler each.
"""

import re
from collections.abc import Callable, Iterable

_W = r"(weight|bias)"
_RESIDUAL = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}
_LAYERS_PER_STAGE = 4  # of the decoder: num_res_blocks + 1 residual blocks, one upsampler

Rename = str | Callable[[re.Match[str]], str]


def _attention(original: str, diffusers: str) -> list[tuple[str, Rename]]:
    return [
        (rf"blocks\.(\d+)\.{original}\.([qkv])\.{_W}", rf"blocks.\1.{diffusers}.to_\2.\3"),
        (rf"blocks\.(\d+)\.{original}\.o\.{_W}", rf"blocks.\1.{diffusers}.to_out.0.\2"),
        (rf"blocks\.(\d+)\.{original}\.(norm_[qk])\.weight", rf"blocks.\1.{diffusers}.\2.weight"),
    ]


TRANSFORMER: list[tuple[str, Rename]] = [
    (rf"patch_embedding\.{_W}", r"patch_embedding.\1"),
    (rf"text_embedding\.0\.{_W}", r"condition_embedder.text_embedder.linear_1.\1"),
    (rf"text_embedding\.2\.{_W}", r"condition_embedder.text_embedder.linear_2.\1"),
    (rf"time_embedding\.0\.{_W}", r"condition_embedder.time_embedder.linear_1.\1"),
    (rf"time_embedding\.2\.{_W}", r"condition_embedder.time_embedder.linear_2.\1"),
    (rf"time_projection\.1\.{_W}", r"condition_embedder.time_proj.\1"),
    (r"blocks\.(\d+)\.modulation", r"blocks.\1.scale_shift_table"),
    *_attention("self_attn", "attn1"),
    *_attention("cross_attn", "attn2"),
    (rf"blocks\.(\d+)\.norm3\.{_W}", r"blocks.\1.norm2.\2"),
    (rf"blocks\.(\d+)\.ffn\.0\.{_W}", r"blocks.\1.ffn.net.0.proj.\2"),
    (rf"blocks\.(\d+)\.ffn\.2\.{_W}", r"blocks.\1.ffn.net.2.\2"),
    (rf"head\.head\.{_W}", r"proj_out.\1"),
    (r"head\.modulation", r"scale_shift_table"),
]

_BLOCK, _LAYER = r"blocks\.(\d+)", r"encoder.block.\1.layer"
TEXT_ENCODER: list[tuple[str, Rename]] = [
    (r"token_embedding\.weight", r"shared.weight"),
    (rf"{_BLOCK}\.norm1\.weight", rf"{_LAYER}.0.layer_norm.weight"),
    (rf"{_BLOCK}\.attn\.([qkvo])\.weight", rf"{_LAYER}.0.SelfAttention.\2.weight"),
    (rf"{_BLOCK}\.pos_embedding\.embedding\.weight", rf"{_LAYER}.0.SelfAttention.relative_attention_bias.weight"),
    (rf"{_BLOCK}\.norm2\.weight", rf"{_LAYER}.1.layer_norm.weight"),
    (rf"{_BLOCK}\.ffn\.gate\.0\.weight", rf"{_LAYER}.1.DenseReluDense.wi_0.weight"),
    (rf"{_BLOCK}\.ffn\.fc1\.weight", rf"{_LAYER}.1.DenseReluDense.wi_1.weight"),
    (rf"{_BLOCK}\.ffn\.fc2\.weight", rf"{_LAYER}.1.DenseReluDense.wo.weight"),
    (r"norm\.weight", r"encoder.final_layer_norm.weight"),
]


def _encoder_residual(match: re.Match[str]) -> str:
    layer, part, what = match.groups()
    return f"encoder.down_blocks.{layer}.{_RESIDUAL[part]}.{what}"


def _middle_residual(match: re.Match[str]) -> str:
    side, layer, part, what = match.groups()
    return f"{side}.mid_block.resnets.{int(layer) // 2}.{_RESIDUAL[part]}.{what}"


def _decoder_layer(match: re.Match[str]) -> str:
    """A layer of `decoder.upsamples` to its stage; `rest` is what it holds."""
    stage, place = divmod(int(match["layer"]), _LAYERS_PER_STAGE)
    if match["part"] is not None:
        return f"decoder.up_blocks.{stage}.resnets.{place}.{_RESIDUAL[match['part']]}.{match['what']}"
    if match["shortcut"] is not None:
        return f"decoder.up_blocks.{stage}.resnets.{place}.conv_shortcut.{match['shortcut']}"
    return f"decoder.up_blocks.{stage}.upsamplers.0.{match['resample']}"


_PARTS = r"residual\.([0236])\.(weight|bias|gamma)"
VAE: list[tuple[str, Rename]] = [
    (rf"conv1\.{_W}", r"quant_conv.\1"),
    (rf"conv2\.{_W}", r"post_quant_conv.\1"),
    (rf"(encoder|decoder)\.conv1\.{_W}", r"\1.conv_in.\2"),
    (r"(encoder|decoder)\.head\.0\.gamma", r"\1.norm_out.gamma"),
    (rf"(encoder|decoder)\.head\.2\.{_W}", r"\1.conv_out.\2"),
    (rf"(encoder|decoder)\.middle\.([02])\.{_PARTS}", _middle_residual),
    (r"(encoder|decoder)\.middle\.1\.(norm\.gamma|(?:to_qkv|proj)\.(?:weight|bias))", r"\1.mid_block.attentions.0.\2"),
    (rf"encoder\.downsamples\.(\d+)\.{_PARTS}", _encoder_residual),
    (rf"encoder\.downsamples\.(\d+)\.shortcut\.{_W}", r"encoder.down_blocks.\1.conv_shortcut.\2"),
    (rf"encoder\.downsamples\.(\d+)\.(resample\.1|time_conv)\.{_W}", r"encoder.down_blocks.\1.\2.\3"),
    (
        r"decoder\.upsamples\.(?P<layer>\d+)\.(?:residual\.(?P<part>[0236])\.(?P<what>weight|bias|gamma)"
        r"|shortcut\.(?P<shortcut>weight|bias)|(?P<resample>(?:resample\.1|time_conv)\.(?:weight|bias)))",
        _decoder_layer,
    ),
]


def renamed(keys: Iterable[str], table: list[tuple[str, Rename]]) -> tuple[dict[str, str], list[str]]:
    """Original key to diffusers key, and the keys that the table does not know."""
    patterns = [(re.compile(pattern), to) for pattern, to in table]
    names, unknown = {}, []
    for key in keys:
        match, to = next(((m, to) for pattern, to in patterns if (m := pattern.fullmatch(key))), (None, ""))
        if match is None:
            unknown.append(key)
        else:
            names[key] = match.expand(to) if isinstance(to, str) else to(match)
    return names, unknown
