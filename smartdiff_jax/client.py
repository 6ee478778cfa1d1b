"""A typed client of `smartdiff serve`.

    from smartdiff_jax import Client

    with Client("http://127.0.0.1:8000") as client:
        job = client.generate("a dog moving left", num_inference_steps=20, on_progress=print)
        client.save(job, "dog.mp4")

`AsyncClient` is the same with `await`. Neither imports JAX.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2

from smartdiff_jax.engine.job import JobStatus
from smartdiff_jax.errors import Cancelled, SmartdiffError

URL = "http://127.0.0.1:8000"
TIMEOUT = httpx2.Timeout(30.0)
SILENCE = httpx2.Timeout(30.0, read=90.0)  # a stream says that it is there every 15 s


class ServiceError(SmartdiffError):
    """The service said no. retry_after: seconds, where it said when to ask again."""

    def __init__(self, status: int, message: str, code: str | None, param: str | None, retry_after: float | None):
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after
        super().__init__(message)


class JobFailed(SmartdiffError):
    """A job ended without a result."""

    def __init__(self, job: JobStatus):
        self.job = job
        error = job.error or {}
        super().__init__(f"{job.id} failed: {error.get('message', 'no reason given')}")


OnProgress = Callable[[JobStatus], object]


class _Calls:
    """What both clients ask, as (method, path, options)."""

    @staticmethod
    def headers(api_key: str | None) -> dict[str, str]:
        return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    @staticmethod
    def submit(prompt: str, idempotency_key: str | None, fields: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        body = {name: value for name, value in fields.items() if value is not None}
        return "POST", "/v1/jobs", {"json": {"prompt": prompt, **body}, "headers": headers}


class Client:
    """Blocking. Raises ServiceError for what the service refuses, and httpx2's errors where it cannot be reached."""

    def __init__(self, base_url: str = URL, api_key: str | None = None):
        self._http = httpx2.Client(base_url=base_url, headers=_Calls.headers(api_key), timeout=TIMEOUT)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def generate(self, prompt: str, *, on_progress: OnProgress | None = None, **fields: Any) -> JobStatus:
        """Submit and wait; `fields` as in `submit`. An exception out of `on_progress`, or Ctrl-C, cancels the job.

        Raises JobFailed, Cancelled.
        """
        job = self.submit(prompt, **fields)
        try:
            for newest in self.events(job.id):
                job = newest
                if on_progress is not None:
                    on_progress(job)
        except BaseException as error:
            with _noting(error, job.id):
                self.cancel(job.id)
            raise
        return _ended_well(job)

    def submit(self, prompt: str, *, idempotency_key: str | None = None, **fields: Any) -> JobStatus:
        """Queue a request. `fields`: those of GenerateParams, and model, output_format, priority, previews."""
        return JobStatus.read(self._ask(*_Calls.submit(prompt, idempotency_key, fields)))

    def get(self, job_id: str) -> JobStatus:
        return JobStatus.read(self._ask("GET", f"/v1/jobs/{job_id}"))

    def jobs(self, *, limit: int = 20, state: str | None = None) -> list[JobStatus]:
        """The newest first."""
        params = {"limit": limit} | ({} if state is None else {"state": state})
        return [JobStatus.read(fields) for fields in self._ask("GET", "/v1/jobs", {"params": params})["data"]]

    def cancel(self, job_id: str) -> JobStatus:
        return JobStatus.read(self._ask("POST", f"/v1/jobs/{job_id}/cancel"))

    def delete(self, job_id: str) -> None:
        self._ask("DELETE", f"/v1/jobs/{job_id}")

    def models(self) -> list[dict[str, Any]]:
        return self._ask("GET", "/v1/models")["data"]

    def events(self, job_id: str) -> Iterator[JobStatus]:
        """The job whenever it has changed, until it has ended."""
        with self._http.stream("GET", f"/v1/jobs/{job_id}/events", timeout=SILENCE) as response:
            if response.status_code >= 400:
                response.read()
                _check(response)
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield JobStatus.read(json.loads(line.removeprefix("data: ")))

    def read(self, url: str) -> bytes:
        """A file of a job: one of its `files`, its `preview`, its `thumbnail`."""
        return _check(self._http.get(url)).content

    def save(self, job: JobStatus, path: str | Path) -> list[Path]:
        """Write a job's results; several get -0, -1, … before the suffix."""
        return [_write(target, self.read(url)) for url, target in _targets(job, Path(path))]

    def _ask(self, method: str, path: str, options: dict[str, Any] | None = None) -> Any:
        return _check(self._http.request(method, path, **(options or {}))).json()


class AsyncClient:
    """The same, for asyncio."""

    def __init__(self, base_url: str = URL, api_key: str | None = None):
        self._http = httpx2.AsyncClient(base_url=base_url, headers=_Calls.headers(api_key), timeout=TIMEOUT)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def generate(self, prompt: str, *, on_progress: OnProgress | None = None, **fields: Any) -> JobStatus:
        """As Client.generate; cancelling the task cancels the job."""
        job = await self.submit(prompt, **fields)
        try:
            async for newest in self.events(job.id):
                job = newest
                if on_progress is not None:
                    on_progress(job)
        except BaseException as error:
            with _noting(error, job.id):
                await self.cancel(job.id)
            raise
        return _ended_well(job)

    async def submit(self, prompt: str, *, idempotency_key: str | None = None, **fields: Any) -> JobStatus:
        return JobStatus.read(await self._ask(*_Calls.submit(prompt, idempotency_key, fields)))

    async def get(self, job_id: str) -> JobStatus:
        return JobStatus.read(await self._ask("GET", f"/v1/jobs/{job_id}"))

    async def jobs(self, *, limit: int = 20, state: str | None = None) -> list[JobStatus]:
        params = {"limit": limit} | ({} if state is None else {"state": state})
        return [JobStatus.read(fields) for fields in (await self._ask("GET", "/v1/jobs", {"params": params}))["data"]]

    async def cancel(self, job_id: str) -> JobStatus:
        return JobStatus.read(await self._ask("POST", f"/v1/jobs/{job_id}/cancel"))

    async def delete(self, job_id: str) -> None:
        await self._ask("DELETE", f"/v1/jobs/{job_id}")

    async def models(self) -> list[dict[str, Any]]:
        return (await self._ask("GET", "/v1/models"))["data"]

    async def events(self, job_id: str) -> AsyncIterator[JobStatus]:
        async with self._http.stream("GET", f"/v1/jobs/{job_id}/events", timeout=SILENCE) as response:
            if response.status_code >= 400:
                await response.aread()
                _check(response)
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    yield JobStatus.read(json.loads(line.removeprefix("data: ")))

    async def read(self, url: str) -> bytes:
        return _check(await self._http.get(url)).content

    async def save(self, job: JobStatus, path: str | Path) -> list[Path]:
        return [_write(target, await self.read(url)) for url, target in _targets(job, Path(path))]

    async def _ask(self, method: str, path: str, options: dict[str, Any] | None = None) -> Any:
        return _check(await self._http.request(method, path, **(options or {}))).json()


def _check(response: httpx2.Response) -> httpx2.Response:
    if response.status_code < 400:
        return response
    retry_after = response.headers.get("retry-after")
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        error = {"message": f"HTTP {response.status_code}: {response.text[:200]}"}
    code, param = error.get("code"), error.get("param")
    raise ServiceError(response.status_code, error["message"], code, param, None if retry_after is None else float(retry_after))


@contextlib.contextmanager
def _noting(stopped_by: BaseException, job_id: str) -> Iterator[None]:
    """Where the job cannot be cancelled, what stopped it is raised all the same, with a note."""
    try:
        yield
    except Exception as why:
        stopped_by.add_note(f"job {job_id} goes on, for it could not be cancelled: {why}")


def _ended_well(job: JobStatus) -> JobStatus:
    if job.state == "cancelled":
        raise Cancelled(f"{job.id} was cancelled")
    if job.state != "succeeded":
        raise JobFailed(job)
    return job


def _targets(job: JobStatus, path: Path) -> list[tuple[str, Path]]:
    if len(job.files) == 1:
        return [(job.files[0], path)]
    return [(url, path.with_stem(f"{path.stem}-{index}")) for index, url in enumerate(job.files)]


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
