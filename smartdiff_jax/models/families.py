"""The families of models: which architectures make one up, and how its latents become tokens."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from smartdiff_jax.models import wan
from smartdiff_jax.models.family import Architecture
from smartdiff_jax.models.text import umt5
from smartdiff_jax.models.vae import wan_vae
from smartdiff_jax.registry import Registry


@dataclasses.dataclass(frozen=True)
class Family:
    """What models of one kind share.

    pipeline_class: `_class_name` in a diffusers folder's model_index.json.
    architectures: by component of that folder; a component listed in `optional` may be absent.
    pack, unpack, rope_table: see models/wan.py.
    max_text_length: text states a prompt is padded to, unless the tokenizer's own limit is lower.
    """

    name: str
    task: str
    pipeline_class: str
    architectures: dict[str, Architecture]
    optional: frozenset[str]
    pack: Callable[..., Any]
    unpack: Callable[..., Any]
    rope_table: Callable[..., tuple[np.ndarray, np.ndarray]]
    max_text_length: int


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
    optional=frozenset({"transformer_2"}),
    pack=wan.pack,
    unpack=wan.unpack,
    rope_table=wan.rope_table,
    max_text_length=512,
)

FAMILIES: Registry[Family] = Registry("family", {"wan": WAN})


def family_of_pipeline(pipeline_class: str) -> Family | None:
    """The family whose diffusers pipeline class this is."""
    return next((family for family in FAMILIES.values() if family.pipeline_class == pipeline_class), None)
