"""A training recipe: one YAML file with every number that decides what a training makes."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError, model_validator

from smartdiff_jax.config.fields import raise_invalid
from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.models.families import FAMILIES, Family
from smartdiff_jax.registry import Registry
from smartdiff_jax.training.autoencoder import AutoencoderSettings
from smartdiff_jax.training.flow_matching import DenoiserSettings


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VideoSettings(_Section):
    """Of the clips: pixels, frames, frames a second."""

    height: PositiveInt
    width: PositiveInt
    num_frames: PositiveInt
    fps: PositiveInt


class TextSettings(_Section):
    """Of the tokenizer. captions: how many of them its vocabulary is counted from."""

    vocab_size: PositiveInt
    max_length: PositiveInt
    captions: PositiveInt = 100_000


class ScoringSettings(_Section):
    """How the model is scored: how many prompts, and how they are sampled."""

    prompts: PositiveInt = 100
    num_inference_steps: PositiveInt = 20
    guidance_scale: PositiveFloat = 4.0
    sampler: str = "flow_unipc"


class Recipe(_Section):
    """Everything that decides what a training makes. The three `dict`s are the components' own config numbers."""

    name: str
    family: str
    seed: int = 0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    video: VideoSettings
    text: TextSettings
    vae: dict[str, Any]
    transformer: dict[str, Any]
    text_encoder: dict[str, Any]
    autoencoder: AutoencoderSettings
    denoiser: DenoiserSettings
    scoring: ScoringSettings = ScoringSettings()

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        if self.transformer.get("text_dim") != self.text_encoder.get("d_model"):
            found, wanted = self.transformer.get("text_dim"), self.text_encoder.get("d_model")
            raise InvalidConfig("transformer.text_dim", found, f"must be text_encoder.d_model, {wanted}")
        if "vocab_size" in self.text_encoder:
            remedy = "leave it out: it follows from the tokenizer; text.vocab_size limits it"
            raise InvalidConfig("text_encoder.vocab_size", self.text_encoder["vocab_size"], remedy)
        part = self.denoiser.part_calls * self.autoencoder.batch_size
        if self.denoiser.pool_size % part:
            remedy = f"must be a multiple of part_calls * autoencoder.batch_size, {part}"
            raise InvalidConfig("denoiser.pool_size", self.denoiser.pool_size, remedy)
        return self

    @property
    def served_by(self) -> Family:
        """The family of models that this recipe trains one of."""
        return FAMILIES[self.family]


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of this package by name, or a YAML file; overrides are "section.field=value", the value in YAML.

    Raises InvalidConfig naming the field, the value and the remedy.
    """
    file = Path(source)
    if file.suffix in (".yaml", ".yml"):
        if not file.is_file():
            raise InvalidConfig("recipe", str(source), "no such file")
        text = file.read_text()
    else:
        bundled = resources.files("smartdiff_jax.training").joinpath("recipes")
        known = {f.name.removesuffix(".yaml"): f for f in bundled.iterdir() if f.name.endswith(".yaml")}
        text = Registry("recipe", known)[str(source)].read_text()
    fields = yaml.safe_load(text)
    if not isinstance(fields, dict):
        raise InvalidConfig("recipe", str(source), "must be a YAML table of sections")
    for override in overrides:
        _override(fields, override)
    try:
        return Recipe(**fields)
    except ValidationError as error:
        raise_invalid(error, InvalidConfig, Recipe, where=f" in the recipe {source}")


def _override(fields: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    *sections, name = path.split(".")
    node: Any = fields
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    if not separator or not isinstance(node, dict):
        raise InvalidConfig("set", override, "write it as section.field=value, such as denoiser.minutes=5")
    node[name] = yaml.safe_load(value)
