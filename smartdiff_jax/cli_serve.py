"""`smartdiff serve`, and the commands that talk to it: submit, jobs, cancel; and `key`."""

import contextlib
import logging
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smartdiff_jax.cli_ray import serve_on_ray
from smartdiff_jax.errors import InvalidConfig, SmartdiffError

if TYPE_CHECKING:
    from smartdiff_jax.client import Client
    from smartdiff_jax.config.service import ServiceConfig
    from smartdiff_jax.config.system import SystemConfig
    from smartdiff_jax.engine.job import JobStatus
    from smartdiff_jax.engine.store import JobStore

log = logging.getLogger("smartdiff")

GRACE_SECONDS = 3
"""After SIGTERM, for answers that are under way; jobs are saved, however long they have to go."""

Url = Annotated[str, typer.Option("--url", help="Where the service is.")]
Key = Annotated[str | None, typer.Option("--api-key", help="An API key, where the service asks for one.")]
HERE = "http://127.0.0.1:8000"


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (serve, submit, jobs, cancel, key):
        app.command()(command)


def serve(
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="A known name, a folder, or a hub id; may be given again.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Where to listen; 0 takes a free one.", show_default="8000")] = None,
    host: Annotated[str | None, typer.Option(help="Any but a loopback address needs --keys.", show_default="127.0.0.1")] = None,
    store: Annotated[str | None, typer.Option(help="Database of jobs.", show_default="sqlite:///jobs.db")] = None,
    artifacts: Annotated[str | None, typer.Option(help="Folder, or fsspec URL, of files.", show_default="artifacts")] = None,
    keys: Annotated[Path | None, typer.Option(help="YAML file of API keys; `smartdiff key` makes one.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of system parameters.")] = None,
    ray: Annotated[Path | None, typer.Option(help="The same, and serve from a Ray cluster as its section `ray` says.")] = None,
) -> None:
    """Serve models over HTTP: OpenAI's images and videos, jobs that last, and a page to use them from."""
    from smartdiff_jax.config.service import ServiceConfig
    from smartdiff_jax.config.system import SystemConfig
    from smartdiff_jax.engine.store import JobStore

    began = time.perf_counter()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING, stream=sys.stderr)
    log.setLevel(logging.INFO)
    if config is not None and ray is not None:
        raise InvalidConfig("config", str(config), "--ray gives a file of system parameters too; give one of the two")
    file = config or ray
    system = SystemConfig.create() if file is None else SystemConfig.from_file(file)
    if system.hosts is not None:
        remedy = "a service runs on one host, or over several of a Ray cluster (`ray.hosts`); leave the section out"
        raise InvalidConfig("hosts", system.hosts.coordinator, remedy)
    given = {"port": port, "host": host, "store": store, "artifacts": artifacts, "keys": keys}
    changes = {name: value for name, value in given.items() if value is not None}
    service = ServiceConfig.create(**system.service.model_dump() | changes)
    models = model or ["pocket-video"]
    if ray is not None:
        return serve_on_ray(models, system, service)
    with contextlib.closing(JobStore(service.store, ttl=service.keep_hours * 3600)) as job_store:
        _run(models, system, service, job_store, config, began)


def _run(
    models: list[str],
    system: "SystemConfig",
    service: "ServiceConfig",
    job_store: "JobStore",
    config: Path | None,
    began: float,
) -> None:
    """Until it is asked to stop. Raises what the models could not be loaded or warmed by."""
    import uvicorn

    from smartdiff_jax.engine.artifacts import Artifacts
    from smartdiff_jax.serve.app import create_app

    files = Artifacts(service.artifacts)

    failures: list[Exception] = []

    def load() -> Any:
        from smartdiff_jax.engine.engine import Engine

        engine = Engine.of(models, system, job_store, files, service)
        log.info("takes jobs for %s after %.1f s", ", ".join(engine.models), time.perf_counter() - began)
        return engine

    def started(failure: Exception | None) -> None:
        if failure is None:
            log.info("ready after %.1f s", time.perf_counter() - began)
        else:
            failures.append(failure)
            server.should_exit = True

    app = create_app(service, load, config)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS))
    app.state.service.on_start = started
    app.state.service.is_leaving = lambda: server.should_exit
    listening = _listen(service.host, service.port)
    address = f"[{service.host}]" if ":" in service.host else service.host
    log.info("listening on http://%s:%d", address, listening.getsockname()[1])
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it once more when all is saved
        server.run(sockets=[listening])
    for failure in failures:
        raise failure if isinstance(failure, SmartdiffError) else SmartdiffError(f"{type(failure).__name__}: {failure}")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # from now on nobody is refused: who comes before the server runs waits for it
        return listening
    except OSError as error:
        raise InvalidConfig("port", port, f"cannot be listened on at {host} ({error.strerror}); choose another") from None


def submit(
    prompt: Annotated[str, typer.Argument(help="What to make.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Wait for it and write it here.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="One of the service's models.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="How many frames.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option("--num-inference-steps", "--steps")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How strictly to follow the prompt.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same picture.")] = None,
    priority: Annotated[str, typer.Option(help="low, normal or high.")] = "normal",
    url: Url = HERE,
    api_key: Key = None,
) -> None:
    """Queue a request at a running service; prints the job's id, or with -o waits and prints the file."""
    fields: dict[str, Any] = dict(
        model=model, size=size, num_frames=num_frames, num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale, seed=seed, priority=priority,
    )  # fmt: skip
    if output is not None:
        fields["output_format"] = output.suffix.removeprefix(".")
    with _client(url, api_key) as client:
        if output is None:
            print(client.submit(prompt, **fields).id)
            return
        job = client.generate(prompt, on_progress=_show, **fields)
        print(file=sys.stderr)
        for path in client.save(job, output):
            print(path)


def jobs(
    limit: Annotated[int, typer.Option(help="How many, the newest first.", min=1, max=100)] = 20,
    state: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed or cancelled.")] = None,
    url: Url = HERE,
    api_key: Key = None,
) -> None:
    """List jobs of a running service."""
    with _client(url, api_key) as client:
        for job in client.jobs(limit=limit, state=state):
            print(f"{job.id}  {describe(job):<28}  {job.params['prompt'][:60]}")


def cancel(
    job_id: Annotated[str, typer.Argument(help="As `submit` printed it.")], url: Url = HERE, api_key: Key = None
) -> None:
    """Cancel a job of a running service."""
    with _client(url, api_key) as client:
        client.cancel(job_id)
        print(job_id)


def key(name: Annotated[str, typer.Argument(help="Whose it is.")]) -> None:
    """Make an API key: prints the key on stderr, once, and its entry for the file of keys on stdout."""
    from smartdiff_jax.config.service import ApiKey, new_key

    secret, hashed = new_key()
    ApiKey(name=name, sha256=hashed)
    print(f"- name: {name}\n  sha256: {hashed}")
    print(secret, file=sys.stderr)


def describe(job: "JobStatus") -> str:
    """One line of where a job stands."""
    if job.is_final or job.state == "queued":
        waits = "" if job.position is None else f", {job.position} before it"
        return f"{job.state}{waits}"
    left = "" if job.eta_seconds is None else f", {job.eta_seconds:.0f} s left"
    return f"{job.stage} {job.done}/{job.total}{left}"


def _show(job: "JobStatus") -> None:
    print(f"\r{describe(job):<40}", end="", file=sys.stderr, flush=True)


def _client(url: str, api_key: str | None) -> "Client":
    import httpx2

    from smartdiff_jax.client import Client

    class Told(Client):
        """Says where nobody answered."""

        def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
            self.close()
            if isinstance(error, httpx2.TransportError):
                raise SmartdiffError(f"no service answers at {url} ({error}); start one with `smartdiff serve`") from None

    return Told(url, api_key)
