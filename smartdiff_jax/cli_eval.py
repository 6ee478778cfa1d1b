"""`smartdiff eval`: how like results are to a reference's."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from smartdiff_jax.errors import InvalidRequest


def add_to(app: typer.Typer) -> None:
    app.command("eval")(evaluate_results)


def evaluate_results(
    reference: Annotated[Path, typer.Argument(help="a folder of results, or one file")],
    others: Annotated[list[Path], typer.Argument(help="folders with results of the same names, or one file each")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write every pair's numbers as JSON")] = None,
    sheet: Annotated[Path | None, typer.Option(help="write a picture: a row a result, a column a folder (.png)")] = None,
) -> None:
    """Compare results pair by pair: PSNR, SSIM, MS-SSIM and flicker, with 95 % intervals over the pairs."""
    from smartdiff_jax.evaluation.compare import contact_sheet, evaluate
    from smartdiff_jax.stages.media import check_output, write_media

    if sheet is not None:
        check_output(sheet)
    if output is not None and not output.parent.is_dir():
        raise InvalidRequest("output", str(output), "its folder does not exist; make it first")
    console = Console()
    with console.status("reading") as status:
        settings = evaluate(reference, others, on_pair=status.update)
    names = list(dict.fromkeys(name for setting in settings for name in setting.means))
    table = Table("against " + reference.name, "pairs", *names)
    for setting in settings:
        numbers = [setting.means.get(name) for name in names]
        cells = ["" if n is None else f"{n.mean:.4g} [{n.low:.4g}, {n.high:.4g}]" for n in numbers]
        table.add_row(Path(setting.place).name, str(len(setting.pairs)), *cells)
    console.print(table)
    if output is not None:
        told = _finite([dataclasses.asdict(setting) for setting in settings])
        output.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n")
    if sheet is not None:
        write_media(sheet, contact_sheet(reference, others)[None], 1)


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
