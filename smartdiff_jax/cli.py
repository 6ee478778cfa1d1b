"""The `smartdiff` command. Wrong input is one line on stderr and exit code 2."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from smartdiff_jax import cli_bench, cli_eval, cli_mesh, cli_profile, cli_serve
from smartdiff_jax.errors import InvalidRequest, SmartdiffError

app = typer.Typer(
    name="smartdiff",
    help="Text to image and video with diffusion transformers, in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_mesh.app, name="mesh")
cli_serve.add_to(app)
cli_bench.add_to(app)
cli_eval.add_to(app)
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


def _named_values(field: str, pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE, the value read as YAML reads it."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            if not equals:
                raise ValueError
            values[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError):
            raise InvalidRequest(field, pair, "write it as NAME=VALUE, for example threshold=0.2") from None
    return values


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
    cache: Annotated[str, typer.Option(help="How evaluations of the model are skipped: auto, or a policy's name.")] = "none",
    cache_ratio: Annotated[float | None, typer.Option(help="Share of the steps to skip, 0 to 1.")] = None,
    cache_params: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of the policy; may be repeated.")] = None,
    attention_sparsity: Annotated[float, typer.Option(help="Share of the keys that attention leaves out, 0 to 1.")] = 0.0,
    compare_cache: Annotated[bool, typer.Option("--compare-cache", help="Run without the cache too, and compare.")] = False,
    config: Annotated[str | None, typer.Option(help="YAML file of system parameters.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write what was done as JSON.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Write a trace for Perfetto (.json.gz); tell what costs most.")] = None,
) -> None:
    """Make a video (or a picture) from a prompt."""
    with _interruptible("nothing was written"):
        from smartdiff_jax.config.request import GenerateParams
        from smartdiff_jax.stages.media import check_output

        if output is not None:
            check_output(output)
        if profile is not None:
            cli_profile.prepare(profile, compare_cache)
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
            cache_ratio=cache_ratio,
            cache_params=_named_values("cache_params", cache_params or []),
            attention_sparsity=attention_sparsity,
        )
        from smartdiff_jax.engine.pipeline import GenerateOutput, Pipeline

        with console.status(f"loading {model}"):
            pipe = Pipeline.from_pretrained(model, weights=weights, system=config, dtype=dtype)
        resolved = pipe.check(request)
        output = output or Path("out.mp4" if resolved.num_frames > 1 else "out.png")
        check_output(output, num_frames=resolved.num_frames, fps=resolved.fps)
        with _bars() as bars:
            show = _shown(bars)
            if compare_cache:
                from smartdiff_jax.engine.comparison import compare

                comparison = compare(pipe, request, show)
                result = comparison.cached
            else:
                comparison = None
                result = cli_profile.made(pipe, request, show, profile, console)
        assert isinstance(result, GenerateOutput), "a stream ends with its output"
        paths = result.save(output)
        if report is not None:
            report.write_text(result.report.to_json())
        for note in result.report.notes:
            console.print(f"[yellow]note:[/] {_escape(note)}", highlight=False)
        seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in result.report.seconds.items())
        console.print(f"seed {result.report.params['seed']}; {seconds}", highlight=False)
        if cache != "none":
            told = result.report.cache
            console.print(f"cache {told['policy']}: {told['ratio']:.1%} skipped; {result.report.steps[0]}", highlight=False)
        if comparison is not None:
            likeness = ", ".join(
                f"PSNR {p:.2f} dB, SSIM {s:.4f}" for p, s in zip(comparison.psnr, comparison.ssim, strict=True)
            )
            console.print(f"{comparison.speed_up:.2f} times as fast as without; {likeness}", highlight=False)
            paths += comparison.side_by_side().save(output.with_stem(f"{output.stem}-compared"))
        for path in (*paths, profile):
            if path is not None:
                print(path)


def _shown(bars: Progress) -> Callable[[Any], Any]:
    """Shows an event of a stream as a bar of its stage, and hands it back."""
    tasks: dict[str, Any] = {}

    def show(event: Any) -> Any:
        if hasattr(event, "stage"):
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total)
            bars.update(tasks[event.stage], completed=event.done)
        return event

    return show


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
def calibrate(
    model: Annotated[str, typer.Argument(help="A known name, a folder, or a hub id.")],
    weights: Annotated[str | None, typer.Option(help="Folder of a known model's weights.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, a prompt a line.", show_default="8 of our own")] = None,
    num_inference_steps: Annotated[list[int], typer.Option("--num-inference-steps", "--steps", help="May be repeated.")] = [50],  # noqa: B006
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; a small one serves all.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="How many frames; few serve all.")] = None,
    config: Annotated[str | None, typer.Option(help="YAML file of system parameters.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.")] = None,
) -> None:
    """Measure what a model's caches go by: a full run a prompt. The numbers are kept beside the weights."""
    with _interruptible("nothing was written"):
        from smartdiff_jax.engine.calibration import PROMPTS
        from smartdiff_jax.engine.pipeline import Pipeline

        wanted = PROMPTS if prompts is None else _lines(prompts)
        with console.status(f"loading {model}"):
            pipe = Pipeline.from_pretrained(model, weights=weights, system=config, dtype=dtype)
        with _bars() as bars:
            task = bars.add_task("calibrate", total=len(wanted) * len(num_inference_steps))
            file = pipe.calibrate(
                wanted,
                num_inference_steps,
                lambda event: bars.update(task, completed=event.done),
                size=size,
                num_frames=num_frames,
            )
    print(file)


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except OSError as error:
        raise InvalidRequest("prompts", str(file), f"cannot be read ({error.strerror}); give a text file") from None
    lines = [line for line in lines if line]
    if not lines:
        raise InvalidRequest("prompts", str(file), "holds no prompt; write one a line")
    return lines


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
    """List the known models: where their weights are, what has been shown of them, and their defaults."""
    from smartdiff_jax.config.model import bundled_folder, known_models
    from smartdiff_jax.config.system import SystemConfig
    from smartdiff_jax.weights.hub import find_fetched

    downloads = SystemConfig.create().cache_dir / "hub"

    for spec in known_models().values():
        sampling = spec.sampling
        if spec.bundled:
            files = [file for file in bundled_folder(spec.name).rglob("*") if file.is_file()]
            weights = f"bundled, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"
        else:
            here = spec.repo is not None and find_fetched(spec.repo, downloads) is not None
            weights = f"{'downloaded' if here else 'downloads on first use'} from {spec.repo}" if spec.repo else "your folder"
        print(f"{spec.name}  ({spec.parameters} parameters, {weights})")
        print(f"    {spec.description}")
        print(f"    {spec.state}")
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
    atlas: Annotated[
        Path | None, typer.Option(help="The sprites, which `prepare` makes; data/FILE of the recipe if not given.")
    ] = None,
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
