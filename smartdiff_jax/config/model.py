"""Model parameters: fixed with the weights, changed by nobody.

A known model is one YAML file in `config/models/`; a checkpoint folder that is not known by name gets a spec made from its
own `config.json` files and its family's defaults.
"""

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smartdiff_jax.config.fields import raise_invalid
from smartdiff_jax.config.shift import DynamicShift
from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.registry import Registry


class SamplingDefaults(BaseModel):
    """What a request gets when it does not say otherwise, as the model card advises, and what the weights demand.

    guidance: "cfg" runs a negative branch; "embedded" tells the model its scale; "none" is distilled to do without.
    guidance_off: the guidance_scale that is no guidance (0 for Z-Image, which counts from the positive branch).
    guidance_norm: "per_token" keeps every token's norm; a number caps a sample's norm at that multiple of the positive one's.
    guidance_truncation: no guidance once 1 - sigma exceeds it.
    guidance_scale_2: guidance of the low-noise expert.
    shift: fixed; shift_by_height: for frames of at most this height, where the card gives one per resolution;
    dynamic_shift: by the number of tokens instead.
    from_one, terminal: see samplers.base.Spacing.
    boundary: with two experts, the timestep (as a fraction of 1000) from which on the high-noise expert is used.
    sizes: names for sizes (width, height) the model was trained on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampler: str = "flow_unipc"
    num_inference_steps: int = 50
    guidance: Literal["cfg", "embedded", "none"] = "cfg"
    guidance_scale: float = 5.0
    guidance_scale_2: float | None = None
    guidance_off: float = 1.0
    guidance_norm: float | Literal["per_token"] | None = None
    guidance_truncation: float = 1.0
    shift: float = 5.0
    shift_by_height: dict[int, float] = Field(default_factory=dict)
    dynamic_shift: DynamicShift | None = Field(default=None, discriminator="kind")
    from_one: bool = False
    terminal: float | None = None
    boundary: float | None = None
    negative_prompt: str = ""
    width: int = 832
    height: int = 480
    sizes: dict[str, tuple[int, int]] = Field(default_factory=dict)
    num_frames: int = 81
    fps: int = 16

    def shift_for(self, height: int, num_tokens: int, num_steps: int) -> float:
        """By the tokens where the model asks for it; else of the smallest listed height that is not below `height`."""
        if self.dynamic_shift is not None:
            return self.dynamic_shift.shift(num_tokens, num_steps)
        fitting = [limit for limit in self.shift_by_height if height <= limit]
        return self.shift_by_height[min(fitting)] if fitting else self.shift


class ModelSpec(BaseModel):
    """One model: what it is called, where it comes from, its numbers and its defaults.

    components: architecture numbers by component, named as in the component's `config.json`; a folder that is loaded under
        this model's name must agree with them.
    bundled: the weights are part of the package.
    state: what has been shown of it, in a line: parity with which implementation, speed measured or not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    family: str
    task: Literal["t2v", "t2i"]
    description: str = ""
    repo: str | None = None
    bundled: bool = False
    parameters: str = ""
    state: str = ""
    sampling: SamplingDefaults = SamplingDefaults()
    components: dict[str, dict[str, Any]] = Field(default_factory=dict)


@cache
def known_models() -> Registry[ModelSpec]:
    """All models described in `config/models/*.yaml`, by name."""
    specs = {}
    for file in sorted(resources.files("smartdiff_jax.config").joinpath("models").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            spec = parse_spec(yaml.safe_load(file.read_text()), source=file.name)
            specs[spec.name] = spec
    return Registry("model", specs)


def parse_spec(fields: dict[str, Any], source: str) -> ModelSpec:
    """A checked ModelSpec, or one InvalidConfig that names the field and the file."""
    try:
        return ModelSpec(**fields)
    except ValidationError as error:
        raise_invalid(error, InvalidConfig, ModelSpec, where=f" in {source}")


def bundled_folder(name: str) -> Path:
    """Where a bundled model's weights lie."""
    return Path(str(resources.files("smartdiff_jax").joinpath("assets", name)))
