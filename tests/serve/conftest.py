"""One server for the tests that do it no harm, and what the others start theirs with."""

import json
import sys
from pathlib import Path

import httpx2
import pytest
import tiny
from postgres import postgres, postgres_server  # noqa: F401

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from running import start  # noqa: E402


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("serve") / "tiny-wan")


@pytest.fixture(scope="package")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "system.yaml"
    settings = {
        "cache_dir": str(path.parent / "cache"),
        "dtype": "float32",
        "service": {"checkpoint_seconds": 0.05, "max_megapixels": 0.35},
    }
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="package")
def server(model, config, tmp_path_factory):
    """One for all tests that do it no harm."""
    server = start(model, config, tmp_path_factory.mktemp("server"))
    yield server
    server.stop()
    assert "Traceback" not in server.log.read_text(), server.log.read_text()


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture
def http(server):
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        yield http
