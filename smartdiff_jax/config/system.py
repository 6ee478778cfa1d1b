"""System parameters: from start to stop of a process, set by whoever operates it."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smartdiff_jax.config.fields import raise_invalid
from smartdiff_jax.config.ray import RayConfig
from smartdiff_jax.config.service import ServiceConfig
from smartdiff_jax.errors import InvalidConfig


class MeshConfig(BaseModel):
    """How many devices along each axis of the mesh; the product is the number of devices used.

    data: several outputs at once. cfg: the branches of guidance. ring, ulysses: the token sequence. tensor: heads and
    feed-forward columns. fsdp: the denoiser's weights are split over ring and ulysses, and a layer gathers its own when
    its turn comes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: int = Field(default=1, ge=1)
    cfg: int = Field(default=1, ge=1, le=2)
    ring: int = Field(default=1, ge=1)
    ulysses: int = Field(default=1, ge=1)
    tensor: int = Field(default=1, ge=1)
    fsdp: bool = False

    @property
    def num_devices(self) -> int:
        return self.data * self.cfg * self.ring * self.ulysses * self.tensor


class HostsConfig(BaseModel):
    """Several hosts, one process each, whose devices are one mesh; host 0 leads, the others run `smartdiff follow`.

    coordinator: "address:port" of host 0 as the others reach it; the port after it is used too. count: of hosts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    coordinator: str = Field(pattern=r"^.+:[0-9]{1,5}$")
    count: int = Field(ge=2)

    @property
    def address(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])


class SystemConfig(BaseModel):
    """One process.

    dtype: of weights and activations; "auto" is bfloat16 on a GPU and float32 elsewhere. float32 means all of it.
    precision: of the products in the denoiser's blocks: "full" is dtype's, "fp8" rounds weights and activations to 8 bits.
    attention: a kernel by name, or "auto" for the fastest that serves each shape.
    sparse_attention: whether requests may leave keys out (`attention_sparsity`); the kernel must be able to.
    guidance: how the two branches of classifier-free guidance run on one device: one after the other, or as a batch of two.
    residency: "all" keeps every component on the devices; "stage" only the one in use, the others in pinned host memory.
    hosts: where the mesh reaches over several hosts; None is one.
    cache_dir: converted weights, downloads and compiled executables are kept here.
    service: of `smartdiff serve`. ray: of `smartdiff serve --ray`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mesh: MeshConfig = MeshConfig()
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    precision: Literal["full", "fp8"] = "full"
    attention: str = "auto"
    sparse_attention: bool = False
    guidance: Literal["sequential", "batched"] = "sequential"
    residency: Literal["all", "stage"] = "all"
    hosts: HostsConfig | None = None
    cache_dir: Path = Field(default_factory=lambda: Path.home() / ".cache" / "smartdiff")
    service: ServiceConfig = ServiceConfig()
    ray: RayConfig = RayConfig()

    @classmethod
    def create(cls, **fields: Any) -> "SystemConfig":
        """A checked configuration, or one InvalidConfig that names every wrong field."""
        try:
            return cls(**fields)
        except ValidationError as error:
            raise_invalid(error, InvalidConfig, cls)

    @classmethod
    def from_file(cls, path: str | Path) -> "SystemConfig":
        """Read a YAML file whose keys are the fields of this class."""
        path = Path(path)
        try:
            fields = yaml.safe_load(path.read_text())
        except OSError as error:
            raise InvalidConfig(
                "config", str(path), f"cannot be read ({error.strerror}); give the path of a YAML file"
            ) from None
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise InvalidConfig("config", str(path), f"is not valid YAML: {error}") from None
        if not isinstance(fields, dict | None) or not all(isinstance(name, str) for name in fields or ()):
            raise InvalidConfig("config", str(path), f"must hold fields such as {', '.join(cls.model_fields)}")
        return cls.create(**(fields or {}))
