"""Tiny checkpoints, written once, a pipeline over each, and a PostgreSQL server."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import sqlalchemy
import tiny
from jax import monitoring

from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.engine.store import metadata

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


class Postgres:
    """A server of our own, on a socket in a folder, which is its URL's."""

    def __init__(self, programs, folder):
        self.url = f"postgresql+psycopg://me@/postgres?host={folder}"
        self._programs, self._folder = programs, folder
        user = {"user": "postgres"} if os.getuid() == 0 else {}  # it refuses to run as root
        if user:
            shutil.chown(folder, "postgres")
        self._quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, "check": True, **user}
        self._run("initdb", "-U", "me", "--auth=trust", "--no-sync")

    def _run(self, program, *options):
        subprocess.run([self._programs / program, "-D", self._folder / "data", *options], **self._quiet)

    def start(self):
        self._run("pg_ctl", "-w", "-o", f"-k {self._folder} -c listen_addresses= -c fsync=off", "start")

    def stop(self):
        """As a crash does: nobody is waited for."""
        self._run("pg_ctl", "-m", "immediate", "stop")


@pytest.fixture(scope="session")
def postgres_server():
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # a socket's path must be short
    server = Postgres(programs[-1], folder)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres(postgres_server):
    """The server, empty: its database is one for all tests."""
    database = sqlalchemy.create_engine(postgres_server.url)
    metadata.drop_all(database)
    database.dispose()
    return postgres_server
