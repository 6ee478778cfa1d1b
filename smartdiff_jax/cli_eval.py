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
    lpips: Annotated[Path | None, typer.Option(help="LPIPS too, by the networks in this folder")] = None,
    clip: Annotated[Path | None, typer.Option(help="CLIP score too, by the CLIPModel in this folder")] = None,
    warping: Annotated[bool, typer.Option("--warping", help="of clips the warping error too")] = False,
    plot: Annotated[Path | None, typer.Option(help="plot likeness over seconds (.svg), which reports tell")] = None,
    plot_metric: Annotated[str, typer.Option(help="what likeness --plot shows")] = "ssim",
) -> None:
    """Compare results pair by pair: PSNR, SSIM, MS-SSIM, flicker and more, with 95 % intervals over the pairs."""
    from smartdiff_jax.evaluation.clip_score import ClipScore
    from smartdiff_jax.evaluation.compare import contact_sheet, evaluate, speed_quality_plot
    from smartdiff_jax.evaluation.lpips import Lpips
    from smartdiff_jax.stages.media import check_output, write_media

    if sheet is not None:
        check_output(sheet)
    for field, file in (("output", output), ("plot", plot)):
        if file is not None and not file.parent.is_dir():
            raise InvalidRequest(field, str(file), "its folder does not exist; make it first")
    networks = [] if lpips is None else Lpips.read(lpips)
    score = None if clip is None else ClipScore(clip)
    console = Console()
    with console.status("reading") as status:
        settings = evaluate(reference, others, status.update, networks, warping, score)
    names = dict.fromkeys(name for setting in settings for name in (*setting.means, *setting.distances))
    table = Table("against " + reference.name, *(Path(setting.place).name for setting in settings))
    table.add_row("pairs", *(str(len(setting.pairs)) for setting in settings))
    for name in names:
        table.add_row(name, *(_cell(setting.means.get(name) or setting.distances.get(name)) for setting in settings))
    console.print(table)
    if output is not None:
        told = _finite([dataclasses.asdict(setting) for setting in settings])
        output.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n")
    if sheet is not None:
        write_media(sheet, contact_sheet(reference, others)[None], 1)
    if plot is not None:
        speed_quality_plot(plot, reference, settings, plot_metric)


def _cell(number: Any) -> str:
    """A mean with its interval, or a distance."""
    if number is None or isinstance(number, float):
        return "" if number is None else f"{number:.4g}"
    return f"{number.mean:.4g} [{number.low:.4g}, {number.high:.4g}]"


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
