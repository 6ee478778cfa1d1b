"""`smartdiff bench`: the measurements of the repository's benchmarks/, by the name of what is measured."""

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from smartdiff_jax.errors import InvalidRequest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SUBJECTS = ("attention", "denoise", "vae", "images", "parallel", "cache", "serve")


def add_to(app: typer.Typer) -> None:
    options = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(context_settings=options)(bench)


def bench(
    context: typer.Context, subject: Annotated[str, typer.Argument(help="what is measured: " + ", ".join(SUBJECTS))]
) -> None:
    """Measure speed, from a checkout of the repository; what follows the subject is the benchmark's own (try --help)."""
    if subject not in SUBJECTS:
        raise InvalidRequest("bench", subject, f"choose one of {', '.join(SUBJECTS)}")
    script = FOLDER / f"{subject}.py"
    if not script.is_file():
        raise InvalidRequest("bench", subject, "benchmarks are not in the package: run this in a checkout of the repository")
    sys.argv = [str(script), *context.args]
    runpy.run_path(str(script), run_name="__main__")
