"""Files of jobs: results, previews, checkpoints; in a folder, or wherever fsspec reaches (`s3://bucket/prefix`)."""

import contextlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec

from smartdiff_jax.errors import InvalidConfig, SmartdiffError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


class StorageFailed(SmartdiffError):
    """A file could not be written or read: a full disk, a lost network."""


class Artifacts:
    """One folder a job. A file appears whole or not at all."""

    def __init__(self, url: str):
        """url: a folder, or a URL that fsspec knows. Raises InvalidConfig where nothing can be written."""
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
            self._fs.makedirs(self._root, exist_ok=True)
        except (OSError, ValueError, ImportError) as error:
            raise InvalidConfig("artifacts", url, f"cannot be used ({error}); give a folder, or a URL fsspec knows") from error
        self._local = "file" in self._fs.protocol

    def write(self, job: str, name: str, data: bytes) -> None:
        """Raises StorageFailed."""
        target = self._path(job, name)
        partial = f"{target}.{secrets.token_hex(4)}.part" if self._local else target
        with _told("written", name):
            try:
                self._fs.makedirs(self._path(job), exist_ok=True)
                self._fs.pipe_file(partial, data)
                if self._local:
                    Path(partial).replace(target)
            finally:
                if self._local:
                    Path(partial).unlink(missing_ok=True)

    def read(self, job: str, name: str) -> bytes:
        """Raises FileNotFoundError, StorageFailed."""
        with _told("read", name):
            return self._fs.cat_file(self._path(job, name))

    def put(self, job: str, folder: Path) -> list[str]:
        """Store every file of a folder; returns their names in order. Raises StorageFailed."""
        names = sorted(file.name for file in folder.iterdir())
        for name in names:
            self.write(job, name, (folder / name).read_bytes())
        return names

    @contextlib.contextmanager
    def fetched(self, job: str, name: str) -> Iterator[Path | None]:
        """The file as a local one while the block runs; None where there is none."""
        folder = Path(tempfile.mkdtemp())
        try:
            path: Path | None = folder / name
            try:
                with _told("read", name):
                    self._fs.get_file(self._path(job, name), str(path))
            except FileNotFoundError:
                path = None
            yield path
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self, job: str, name: str | None = None) -> None:
        """Remove a file, or all that a job has; what is not there is removed already."""
        with contextlib.suppress(FileNotFoundError), _told("removed", name or job):
            self._fs.rm(self._path(job, name), recursive=name is None)

    def _path(self, job: str, name: str | None = None) -> str:
        for part in (job,) if name is None else (job, name):
            if not NAME.fullmatch(part):
                raise FileNotFoundError(part)  # no name from outside ever leaves the folder
        return f"{self._root}/{job}" + ("" if name is None else f"/{name}")


@contextlib.contextmanager
def _told(what: str, name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageFailed(f"{name} cannot be {what}: {error.strerror or error}") from error
