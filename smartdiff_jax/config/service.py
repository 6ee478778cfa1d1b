"""System parameters of the service: where it listens, where it keeps jobs, what it takes; and the keys that open it."""

import hashlib
import secrets
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smartdiff_jax.config.fields import raise_invalid
from smartdiff_jax.errors import InvalidConfig

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Limits(BaseModel):
    """What may be changed while a service runs.

    max_queued: jobs that wait; more are turned away. max_megapixels: width x height x frames x outputs of one request.
    keep_hours: how long a finished job and its files are kept.
    checkpoint_seconds: device time after which a running job is saved, and the most that a crash costs it, and one chunk.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_queued: int = Field(default=256, ge=1)
    max_megapixels: float = Field(default=1000.0, gt=0)
    keep_hours: float = Field(default=24.0, gt=0)
    checkpoint_seconds: float = Field(default=10.0, ge=0)


class ServiceConfig(Limits):
    """The limits, and what holds from start to stop.

    host, port: where to listen; any address but a loopback one needs keys.
    store: URL of the database of jobs. artifacts: folder, or URL of fsspec, of their files.
    keys: YAML file of API keys (`smartdiff key`).
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    store: str = "sqlite:///jobs.db"
    artifacts: str = "artifacts"
    keys: Path | None = None

    @classmethod
    def create(cls, **fields: Any) -> "ServiceConfig":
        """A checked configuration, or one InvalidConfig that names every wrong field."""
        try:
            return cls(**fields)
        except ValidationError as error:
            raise_invalid(error, InvalidConfig, cls)

    @model_validator(mode="after")
    def _public_needs_keys(self) -> "ServiceConfig":
        if self.host not in LOOPBACK and self.keys is None:
            raise InvalidConfig("host", self.host, "others can reach this address: give --keys, or listen on 127.0.0.1")
        return self


class ApiKey(BaseModel):
    """One key. The file holds its hash, never the key.

    share: of the device, beside other keys. max_running, max_queued: of its jobs.
    max_work: megapixels times steps of one request. admin: sees and ends the jobs of all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    share: float = Field(default=1.0, gt=0, le=1000)
    max_running: int = Field(default=64, ge=1)
    max_queued: int = Field(default=256, ge=1)
    max_work: float | None = Field(default=None, gt=0)
    admin: bool = False


EVERYONE = ApiKey(name="everyone", sha256="0" * 64, max_queued=2**31, admin=True)
"""Who calls where no keys are asked for."""


def new_key() -> tuple[str, str]:
    """A key and its hash: 256 random bits need no salt."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    return key, hash_key(key)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> dict[str, ApiKey]:
    """Keys by hash, from a YAML list of ApiKey's fields. Raises InvalidConfig."""
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidConfig("keys", str(path), f"cannot be read as YAML: {error}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InvalidConfig("keys", str(path), "must be a list of keys; `smartdiff key NAME` prints one")
    try:
        keys = [ApiKey.model_validate(entry) for entry in entries]
    except ValidationError as error:
        raise_invalid(error, InvalidConfig, ApiKey, where=f" in {path}")
    by_hash = {key.sha256: key for key in keys}
    if len(by_hash) < len(keys) or len({key.name for key in keys}) < len(keys):
        raise InvalidConfig("keys", str(path), "holds a name or a hash twice")
    return by_hash
