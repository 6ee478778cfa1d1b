"""A PostgreSQL server for tests, where Debian's package is installed."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import sqlalchemy

from smartdiff_jax.engine.store import metadata


def programs():
    """The newest installed ones' folder, or None."""
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


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
    if (found := programs()) is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # a socket's path must be short
    server = Postgres(found, folder)
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
