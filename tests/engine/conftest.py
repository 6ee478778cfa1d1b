"""Tiny checkpoints, written once, and a pipeline over each."""

import pytest
import tiny

from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.engine.pipeline import Pipeline


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
