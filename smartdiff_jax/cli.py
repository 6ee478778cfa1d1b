"""The command line: generate, models, mesh, convert, train. Wrong input is one line on stderr and exit code 2."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from smartdiff_jax import cli_mesh
from smartdiff_jax.errors import SmartdiffError

app = typer.Typer(
    name="smartdiff",
    help="Text to image and video with diffusion transformers, in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_mesh.app, name="mesh")
console = Console(stderr=True)


def main() -> None:
    """Entry point of the `smartdiff` command."""
    try:
        app()
    except SmartdiffError as error:
        console.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


@contextlib.contextmanager
def _interruptible(left: str) -> Iterator[None]:
    """Ctrl-C ends a command with one line that says what was left behind."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"cancelled; {left}")
        raise typer.Exit(130) from None


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to make.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to: .mp4, .webp, .gif, .png or .jpg.", show_default="out.mp4 or out.png"),
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="A known name, a folder, or a hub id.")] = "pocket-video",
    weights: Annotated[str | None, typer.Option(help="Folder of a known model's weights.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, or a name of the model's such as 16:9.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="How many frames.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option("--num-inference-steps", "--steps", help="1 to 200.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How strictly to follow the prompt; 1 is off.")] = None,
    guidance_scale_2: Annotated[float | None, typer.Option(help="The same for the low-noise expert.")] = None,
    shift: Annotated[float | None, typer.Option(help="How far the steps lean to high noise.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same picture.")] = None,
    num_outputs: Annotated[int, typer.Option(help="How many, with seeds seed, seed + 1, …")] = 1,
    sampler: Annotated[str | None, typer.Option(help="flow_unipc, flow_euler or flow_dpmpp.")] = None,
    cache: Annotated[str, typer.Option(help="Feature cache policy.")] = "none",
    config: Annotated[str | None, typer.Option(help="YAML file of system parameters.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write what was done as JSON.")] = None,
) -> None:
    """Make a video (or a picture) from a prompt."""
    with _interruptible("nothing was written"):
        from smartdiff_jax.config.request import GenerateParams
        from smartdiff_jax.stages.media import check_output

        if output is not None:
            check_output(output)
        request = GenerateParams.create(
            prompt=prompt,
            negative_prompt=negative_prompt,
            size=size,
            num_frames=num_frames,
            fps=fps,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
            shift=shift,
            seed=seed,
            num_outputs=num_outputs,
            sampler=sampler,
            cache=cache,
        )
        from smartdiff_jax.engine.pipeline import GenerateOutput, Pipeline

        with console.status(f"loading {model}"):
            pipe = Pipeline.from_pretrained(model, weights=weights, system=config, dtype=dtype)
        resolved = pipe.check(request)
        output = output or Path("out.mp4" if resolved.num_frames > 1 else "out.png")
        check_output(output, num_frames=resolved.num_frames, fps=resolved.fps)
        result = None
        with _bars() as bars:
            tasks = {}
            for event in pipe.stream(request):
                if isinstance(event, GenerateOutput):
                    result = event
                    break
                if event.stage not in tasks:
                    tasks[event.stage] = bars.add_task(event.stage, total=event.total)
                bars.update(tasks[event.stage], completed=event.done)
        assert result is not None, "a stream ends with its output"
        paths = result.save(output)
        if report is not None:
            report.write_text(result.report.to_json())
        for note in result.report.notes:
            console.print(f"[yellow]note:[/] {_escape(note)}", highlight=False)
        seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in result.report.seconds.items())
        console.print(f"seed {result.report.params['seed']}; {seconds}", highlight=False)
        for path in paths:
            print(path)


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


@app.command()
def follow(
    host: Annotated[int, typer.Argument(help="Which host this is: 1, 2, …; host 0 leads.", min=1)],
    config: Annotated[str, typer.Option(help="YAML file of system parameters, with the section `hosts`.")],
) -> None:
    """Be one of several hosts, until the command that leads them ends."""
    from smartdiff_jax.config.system import SystemConfig
    from smartdiff_jax.engine.hosts import follow as follow_leader
    from smartdiff_jax.errors import InvalidConfig

    system = SystemConfig.from_file(config)
    if system.hosts is None:
        raise InvalidConfig("hosts", None, "give coordinator (address:port of host 0) and count")
    with _interruptible("the hosts must be started again"):
        follow_leader(system.hosts, host, system.cache_dir)


@app.command()
def models() -> None:
    """List the known models, and where their weights are."""
    from smartdiff_jax.config.model import bundled_folder, known_models
    from smartdiff_jax.config.system import SystemConfig
    from smartdiff_jax.weights.hub import is_fetched

    downloads = SystemConfig.create().cache_dir / "hub"

    for spec in known_models().values():
        sampling = spec.sampling
        if spec.bundled:
            files = [file for file in bundled_folder(spec.name).rglob("*") if file.is_file()]
            weights = f"bundled, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"
        else:
            here = spec.repo is not None and is_fetched(spec.repo, downloads)
            weights = f"{'downloaded' if here else 'downloads on first use'} from {spec.repo}" if spec.repo else "your folder"
        print(f"{spec.name}  ({spec.parameters} parameters, {weights})")
        print(f"    {spec.description}")
        frames = f"{sampling.num_frames} frames at {sampling.fps} fps, " if spec.task == "t2v" else ""
        print(f"    by default {sampling.width}x{sampling.height}, {frames}{sampling.num_inference_steps} steps")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder in the original Wan layout.")],
    target: Annotated[Path, typer.Argument(help="Folder to make, in diffusers layout.")],
) -> None:
    """Convert an original Wan release (safetensors and .pth) to the diffusers layout."""
    from smartdiff_jax.weights.convert import convert as convert_folder

    with _interruptible("nothing was written"):
        convert_folder(source, target)
    print(target)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a YAML file.")] = "pocket-video",
    stage: Annotated[str, typer.Option(help="prepare, autoencoder, denoiser, export, evaluate or all.")] = "all",
    atlas: Annotated[Path, typer.Option(help="The training pictures; `prepare` makes the file.")] = Path("data/atlas.npz"),
    run_dir: Annotated[Path | None, typer.Option(help="Checkpoints and logs; runs/RECIPE if not given.")] = None,
    out: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the trained model.")] = None,
    init_from: Annotated[Path | None, typer.Option(help="Start from the weights of this model folder.")] = None,
    call_minutes: Annotated[float | None, typer.Option(help="Stop after this many minutes, to be continued.")] = None,
    finish: Annotated[bool, typer.Option(help="End the schedule when the call's minutes end.")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="SECTION.FIELD=VALUE of the recipe.")] = None,
) -> None:
    """Train a small model as the bundled ones were; goes on where an earlier call stopped."""
    from smartdiff_jax.training.recipe import main_train

    with _interruptible("the newest checkpoint is kept"):
        main_train(recipe, stage, atlas, run_dir, out, init_from, call_minutes, finish, overrides or ())
