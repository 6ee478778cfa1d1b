"""What may change while a service runs: its limits, and the keys that open it. Their files are looked at all the time.

A file is read once it has stood still from one look to the next, so that none is read half written. One that cannot be taken
leaves in force what was, and is told of by the log, /metrics and /admin/limits until it can.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from smartdiff_jax.config.service import ApiKey, Limits, ServiceConfig, read_keys
from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.errors import InvalidConfig

LOOK_SECONDS = 0.5

T = TypeVar("T")
log = logging.getLogger("smartdiff")


class SettingsFile(Generic[T]):
    """value: what was read last and could be. refused: why what lies there now could not."""

    def __init__(self, path: Path, read: Callable[[Path], T]):
        self._path, self._read = path, read
        self._seen = self._taken = self._stamp()
        self.value = read(path)
        self.refused: str | None = None

    def look(self) -> bool:
        """Whether it was read anew."""
        seen, self._seen = self._seen, self._stamp()
        if self._seen == self._taken or self._seen != seen:
            return False
        self._taken = self._seen
        try:
            self.value, self.refused = self._read(self._path), None
            log.info("%s is in force as it lies there now", self._path)
        except InvalidConfig as error:
            self.refused = str(error)
            log.error("%s is not taken, what was in force stays: %s", self._path, error)
        return True

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size


class Settings:
    """Those of one service. config: with what it was started. config_file: where the limits are read from, if from a file."""

    def __init__(self, config: ServiceConfig, config_file: Path | None):
        self._config = config
        self._keys = None if config.keys is None else SettingsFile(config.keys, read_keys)
        self._system = None if config_file is None else SettingsFile(config_file, SystemConfig.from_file)
        self._started_with = None if self._system is None else self._system.value

    def look(self) -> bool:
        """Whether any file was read anew."""
        return any([file.look() for file in (self._keys, self._system) if file is not None])

    @property
    def keys(self) -> dict[str, ApiKey]:
        """By hash; none where the service was started without a file of keys."""
        return {} if self._keys is None else self._keys.value

    @property
    def limits(self) -> Limits:
        return self._config if self._system is None else self._system.value.service

    @property
    def refused(self) -> dict[str, str | None]:
        """By file, "keys" or "config", why it is not taken as it lies there."""
        files = {"keys": self._keys, "config": self._system}
        return {name: file.refused for name, file in files.items() if file is not None}

    @property
    def need_restart(self) -> list[str]:
        """What has changed in the file of system parameters and holds from start to stop."""
        if self._system is None or self._started_with is None:
            return []
        was, now = (_flat(system) for system in (self._started_with, self._system.value))
        return [name for name in now if name not in Limits.model_fields and was[name] != now[name]]


def _flat(system: SystemConfig) -> dict[str, object]:
    return system.model_dump(exclude={"service"}) | system.service.model_dump()
