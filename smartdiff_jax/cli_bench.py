"""`smartdiff bench`: the measurements of the repository's benchmarks/, by the name of what is measured."""

import importlib.util
import runpy
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from smartdiff_jax.errors import InvalidRequest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SUBJECTS = tuple("attention compiled denoise vae images encode end-to-end parallel cache cache-speed quality serve".split())


def add_to(app: typer.Typer) -> None:
    options = {"ignore_unknown_options": True, "help_option_names": []}
    app.command(context_settings=options)(bench)


def bench(
    subject: Annotated[str | None, typer.Argument(help="what is measured: " + ", ".join(SUBJECTS))] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="the benchmark's own")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="two results of one benchmark: ends with 1 where the second is slower")
    ] = None,
) -> None:
    """Measure speed, from a checkout of the repository; what follows the subject is the benchmark's own (try --help)."""
    if compare is not None:
        if subject is not None:
            raise InvalidRequest("compare", subject, "goes with --compare FILE FILE alone; leave it out")
        _show(_script("compare"), *compare)
    elif subject in SUBJECTS:
        script = _script(subject)
        sys.argv = [str(script), *(arguments or ())]
        runpy.run_path(str(script), run_name="__main__")
    else:
        raise InvalidRequest("bench", subject, f"choose one of {', '.join(SUBJECTS)}, or give --compare two results")


def _script(subject: str) -> Path:
    script = FOLDER / f"{subject.replace('-', '_')}.py"
    if not script.is_file():
        raise InvalidRequest("bench", subject, "benchmarks are not in the package: run this in a checkout of the repository")
    return script


def _show(script: Path, before: Path, after: Path) -> None:
    """The comparison, a line a timing; ends with 1 where something is slower."""
    comparison = _loaded(script).compare(before, after)
    width = max(len(row.name) for row in comparison.rows)
    print(f"{'':{width}}  {'before, s':>12}  {'after, s':>12}   ratio")
    for row in comparison.rows:
        print(f"{row.name:{width}}  {row.before:12.6g}  {row.after:12.6g}  {row.ratio:6.3f}  {row.verdict}".rstrip())
    for names, file in ((comparison.missing, before), (comparison.new, after)):
        if names:
            print(f"only in {file}: {', '.join(names)}")
    if comparison.slower:
        print(f"{len(comparison.slower)} of {len(comparison.rows)} timings are slower by more than the spread")
        raise typer.Exit(1)


def _loaded(script: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{script.stem}", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
