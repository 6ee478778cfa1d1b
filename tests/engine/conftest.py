"""Tiny checkpoints, written once, and a pipeline over each."""

import pytest
import tiny
from jax import monitoring
from postgres import postgres, postgres_server  # noqa: F401

from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.engine.pipeline import Pipeline

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Executables that JAX itself says it compiled."""

    def __init__(self):
        self.count = 0
        monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **kwargs):
        self.count += event == COMPILE_EVENT


@pytest.fixture(scope="session")
def compiles():
    return CompileCounter()


@pytest.fixture(scope="session")
def system(tmp_path_factory):
    return SystemConfig.create(cache_dir=tmp_path_factory.mktemp("cache"), dtype="float32")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("one") / "tiny-wan")


@pytest.fixture(scope="session")
def experts_folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("two") / "tiny-wan22", two_experts=True, flow_shift=12.0)


@pytest.fixture(scope="session")
def pipe(folder, system):
    return Pipeline.from_pretrained(folder, system=system)


@pytest.fixture(scope="session")
def experts_pipe(experts_folder, system):
    return Pipeline.from_pretrained(experts_folder, system=system)
