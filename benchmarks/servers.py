"""`smartdiff serve` in a process of its own, for benchmarks of the service."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def launch(folder: Path, log: Path, models: Sequence[str], before: str = "") -> subprocess.Popen:
    """Start one in `folder`, where service.yaml, its store and its files are. before: Python that it runs first."""
    code = before + "from smartdiff_jax.cli import main; main()"
    options = [word for model in models for word in ("--model", model)]
    command = [sys.executable, "-c", code, "serve", *options, "--port", "0", "--config", str(folder / "service.yaml")]
    # Where Python is told to write no bytecode, every start would parse all of JAX again.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with log.open("w") as out:
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env=environment)


def address(log: Path) -> str:
    """Where it listens; empty while it does not yet."""
    found = re.search(r"listening on (\S+)", log.read_text())
    return "" if found is None else found[1]
