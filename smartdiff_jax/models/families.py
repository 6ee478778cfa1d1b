"""The families of models: which architectures make one up, how its latents become tokens, and what text it is told."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from smartdiff_jax.models import flux1, flux2, qwen_image, wan, z_image
from smartdiff_jax.models.family import Architecture
from smartdiff_jax.models.patches import Patches
from smartdiff_jax.models.text import clip, prompts, qwen, t5, umt5
from smartdiff_jax.models.text.source import TextSource
from smartdiff_jax.models.vae import autoencoder_kl, qwen_image_vae, wan_vae
from smartdiff_jax.registry import Registry

BUCKETS = (64, 128, 256, 512)
"""Padded lengths of text that is masked: few executables, and little padding for prompts of a sentence or two."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What models of one kind share.

    pipeline_class: `_class_name` in a diffusers folder's model_index.json.
    architectures: by component of that folder; a component listed in `optional` may be absent.
    patches: of the transformer's config.
    rope: (config, token grid, padded text length, text length) -> rotary tables of the tokens and of the text (or None),
        each (cos, sin) float32 [n, head_dim / 2].
    text: what the model is told of a prompt.
    """

    name: str
    task: Literal["t2v", "t2i"]
    pipeline_class: str
    architectures: dict[str, Architecture]
    patches: Callable[[Any], Patches]
    rope: Callable[..., tuple[Any, Any]]
    text: tuple[TextSource, ...]
    optional: frozenset[str] = frozenset()


WAN = Family(
    name="wan",
    task="t2v",
    pipeline_class="WanPipeline",
    architectures={
        "transformer": wan.ARCHITECTURE,
        "transformer_2": wan.ARCHITECTURE,
        "text_encoder": umt5.ARCHITECTURE,
        "vae": wan_vae.ARCHITECTURE,
    },
    patches=wan.patches,
    rope=wan.rope,
    text=(TextSource(prompts.wan, 512, zero_padding=True),),
    optional=frozenset({"transformer_2"}),
)

FLUX1 = Family(
    name="flux1",
    task="t2i",
    pipeline_class="FluxPipeline",
    architectures={
        "transformer": flux1.ARCHITECTURE,
        "text_encoder": clip.ARCHITECTURE,
        "text_encoder_2": t5.ARCHITECTURE,
        "vae": autoencoder_kl.ARCHITECTURE,
    },
    patches=flux1.patches,
    rope=flux1.rope,
    text=(
        TextSource(prompts.plain, 512, tokenizer="tokenizer_2", encoder="text_encoder_2", attend_padding=True),
        TextSource(prompts.plain, 77, field="pooled", attend_padding=True),
    ),
)

FLUX2_KLEIN = Family(
    name="flux2-klein",
    task="t2i",
    pipeline_class="Flux2KleinPipeline",
    architectures={
        "transformer": flux2.ARCHITECTURE,
        "text_encoder": qwen.QWEN3,
        "vae": autoencoder_kl.FLUX2_ARCHITECTURE,
    },
    patches=flux2.patches,
    rope=flux2.rope,
    text=(TextSource(prompts.flux2_klein, 512, layers=(9, 18, 27)),),
)

QWEN_IMAGE = Family(
    name="qwen-image",
    task="t2i",
    pipeline_class="QwenImagePipeline",
    architectures={
        "transformer": qwen_image.ARCHITECTURE,
        "text_encoder": qwen.QWEN25_VL,
        "vae": qwen_image_vae.ARCHITECTURE,
    },
    patches=qwen_image.patches,
    rope=qwen_image.rope,
    text=(
        TextSource(
            prompts.qwen_image, 512 + prompts.QWEN_IMAGE_SKIP, skip=prompts.QWEN_IMAGE_SKIP, layers=(-1,), buckets=BUCKETS
        ),
    ),
)

Z_IMAGE = Family(
    name="z-image",
    task="t2i",
    pipeline_class="ZImagePipeline",
    architectures={
        "transformer": z_image.ARCHITECTURE,
        "text_encoder": qwen.QWEN3,
        "vae": autoencoder_kl.ARCHITECTURE,
    },
    patches=z_image.patches,
    rope=z_image.rope,
    text=(TextSource(prompts.z_image, 512, layers=(-2,), buckets=BUCKETS),),
)

FAMILIES: Registry[Family] = Registry(
    "family", {family.name: family for family in (WAN, FLUX1, FLUX2_KLEIN, QWEN_IMAGE, Z_IMAGE)}
)


def family_of_pipeline(pipeline_class: str) -> Family | None:
    """The family whose diffusers pipeline class this is."""
    return next((family for family in FAMILIES.values() if family.pipeline_class == pipeline_class), None)
