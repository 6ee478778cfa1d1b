"""A training recipe: one YAML file with every number that decides what a training makes."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from smartdiff_jax.config.fields import raise_invalid
from smartdiff_jax.config.model import ModelSpec, SamplingDefaults
from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.models.families import FAMILIES, Family
from smartdiff_jax.registry import Registry
from smartdiff_jax.training.autoencoder import AutoencoderSettings
from smartdiff_jax.training.data.atlas import SIDE
from smartdiff_jax.training.flow_matching import DenoiserSettings
from smartdiff_jax.training.trainees import TRAINEES, Trainee

FOLLOWING = frozenset({"width", "height", "num_frames", "fps", "shift", "dynamic_shift"})
"""Defaults of sampling that follow from what the model is trained at."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AtlasSettings(_Section):
    """The file of sprites: its name in the data folder, the side of a sprite in pixels, and whether it holds clips."""

    file: str = "atlas.npz"
    side: PositiveInt = SIDE
    animated: bool = True


class OutputSettings(_Section):
    """What the model makes: pixels, frames, frames a second."""

    height: PositiveInt
    width: PositiveInt
    num_frames: PositiveInt = 1
    fps: PositiveInt = 1


class TextSettings(_Section):
    """Of the tokenizer. max_length: tokens of a text, those of its template included. captions: how many of them the
    vocabulary is counted from."""

    vocab_size: PositiveInt
    max_length: PositiveInt
    captions: PositiveInt = 100_000


class ScoringSettings(_Section):
    """How the model is scored while it is trained: how many prompts, in how many steps."""

    prompts: PositiveInt = 100
    num_inference_steps: PositiveInt = 20


class Recipe(_Section):
    """Everything that decides what a training makes. The three `dict`s are the components' own config numbers.

    description: of the model, for `smartdiff models`. bits: of a number of the bundled weights. sampling: its defaults; size,
    frames and shift are those it is trained at.
    """

    name: str
    family: str
    description: str = ""
    seed: int = 0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    bits: int = Field(8, ge=2, le=8)
    atlas: AtlasSettings = AtlasSettings()
    output: OutputSettings
    text: TextSettings
    vae: dict[str, Any]
    transformer: dict[str, Any]
    text_encoder: dict[str, Any]
    autoencoder: AutoencoderSettings
    denoiser: DenoiserSettings
    sampling: SamplingDefaults = SamplingDefaults()
    scoring: ScoringSettings = ScoringSettings()

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        taken, given = self.trainee.text_width
        found, wanted = self.transformer.get(taken), self.text_encoder.get(given)
        if found != wanted:
            raise InvalidConfig(f"transformer.{taken}", found, f"must be text_encoder.{given}, {wanted}")
        if self.served_by.task == "t2i" and self.output.num_frames != 1:
            raise InvalidConfig("output.num_frames", self.output.num_frames, f"{self.family} makes pictures: leave it out")
        for name in FOLLOWING & self.sampling.model_fields_set:
            remedy = "leave it out: it is what the model is trained at (output, denoiser.shift)"
            raise InvalidConfig(f"sampling.{name}", getattr(self.sampling, name), remedy)
        skip = self.served_by.text[0].skip
        if self.text.max_length <= skip:
            raise InvalidConfig("text.max_length", self.text.max_length, f"must be more than the template's {skip} tokens")
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

    @property
    def trainee(self) -> Trainee:
        """How that family is trained."""
        return TRAINEES[self.family]

    @property
    def served_as(self) -> SamplingDefaults:
        """The defaults of the trained model."""
        trained_at = self.output.model_dump() | {"shift": self.denoiser.shift}
        return self.sampling.model_copy(update=trained_at)

    def spec(self, parameters: int) -> ModelSpec:
        """What `config/models` says of the trained model, of so many parameters."""
        return ModelSpec(
            name=self.name,
            family=self.family,
            task=self.served_by.task,  # pyright: ignore[reportArgumentType]
            description=self.description,
            bundled=True,
            parameters=f"{parameters / 1e6:.0f} M",
            state="trained by its recipe; scores in its card",
            sampling=self.served_as,
        )


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
