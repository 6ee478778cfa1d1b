"""System parameters of a service on a Ray cluster, and paths that mean the same on whichever machine reads them."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from smartdiff_jax.config.service import ServiceConfig
from smartdiff_jax.errors import InvalidConfig

SQLITE = "sqlite"


class RayConfig(BaseModel):
    """How many engines there are and what each takes. An engine with the app over it is a replica.

    address: of a cluster, as `ray start` prints it, or "auto" for the one this machine is part of; None starts one on this
        machine that ends with the command.
    replicas: how many at least. max_replicas: how many at most; None is as many as `replicas`, always.
    queue_seconds: so soon all that has been accepted is to be done; where it would take longer there are more replicas.
    cpus, gpus: of each host, for a replica alone. None is a GPU for each of the mesh's devices; 0 is for CPUs.
    hosts: over how many hosts the mesh of one replica reaches.
    drain_seconds: how long a replica that is replaced waits for the answers it is giving, such as streams of events.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = None
    replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    queue_seconds: float = Field(default=60.0, gt=0)
    cpus: int = Field(default=1, ge=1)
    gpus: int | None = Field(default=None, ge=0)
    hosts: int = Field(default=1, ge=1)
    drain_seconds: float = Field(default=600.0, gt=0)

    @model_validator(mode="after")
    def _not_fewer_than_at_least(self) -> "RayConfig":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas} is less than replicas={self.replicas}; give more, or leave it out"
            )
        return self

    def gpus_of_a_host(self, num_devices: int) -> int:
        """num_devices: of the mesh of one replica. Raises InvalidConfig where they do not divide over its hosts."""
        if num_devices % self.hosts:
            raise InvalidConfig("ray.hosts", self.hosts, f"must divide the mesh's {num_devices} devices")
        return num_devices // self.hosts if self.gpus is None else self.gpus


def settled(service: ServiceConfig) -> ServiceConfig:
    """With the paths that were meant from this folder made whole, for processes that start in others.

    Raises InvalidConfig for what processes cannot share: a database in memory, a port that each would choose for itself.
    """
    if service.port == 0:
        raise InvalidConfig("port", 0, "all machines listen on one port; give its number")
    return service.model_copy(
        update={
            "store": _whole_store(service.store),
            "artifacts": service.artifacts if "://" in service.artifacts else str(Path(service.artifacts).resolve()),
            "keys": None if service.keys is None else service.keys.resolve(),
        }
    )


def _whole_store(url: str) -> str:
    driver, slashes, path = url.partition(":///")
    if not is_sqlite(url):
        return url
    path, mark, options = path.partition("?")
    if not slashes or path in ("", ":memory:"):
        raise InvalidConfig("store", url, "replicas share no memory; name a file, as in sqlite:///jobs.db, or use PostgreSQL")
    return f"{driver}{slashes}{Path(path).resolve()}{mark}{options}"


def is_sqlite(url: str) -> bool:
    return url.partition(":")[0].partition("+")[0] == SQLITE
