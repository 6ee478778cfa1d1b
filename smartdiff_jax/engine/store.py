"""Jobs that last: SQLite in a file by default, PostgreSQL by URL; several engines may pull from one store.

Every change of a job's state is one UPDATE that names the state, and the engine, it changes from: of two that try, one sees
no row and knows that it lost. Leases are told by the hosts' clocks, which must agree within a few seconds.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection

from smartdiff_jax.engine.job import FINAL, Job, Priority, State
from smartdiff_jax.errors import InvalidConfig, SmartdiffError

LEASE_SECONDS = 15.0
"""How long an engine may be silent before another takes its jobs up."""
IMPOSSIBLE_SECONDS = 4 * LEASE_SECONDS
"""A lease that goes on for longer was given before the clock was set back, and may be a dead engine's."""
MAX_ATTEMPTS = 5
"""How often a job is begun without getting further; one that kills its engine every time must end."""
POISONED = {"code": "engine_died", "message": f"the engine died {MAX_ATTEMPTS} times while it ran this job"}
AWAY = OSError, OperationalError, InterfaceError, NoConnection
"""What is raised while the database cannot be reached, is locked or full: it may go away by itself, as nothing else does."""
BUSY_SECONDS = 10.0
COLUMNS: dict[Any, Any] = {str: sa.Text, float: sa.Float, int: sa.Integer, bool: sa.Boolean}

metadata = sa.MetaData()


def _column(field: dataclasses.Field) -> sa.Column:
    plain = next((kind for kind in COLUMNS if field.type in (kind, kind | None)), None)
    if field.name in ("state", "priority"):
        plain = str
    kind = sa.JSON(none_as_null=True) if plain is None else COLUMNS[plain]
    return sa.Column(field.name, kind, primary_key=field.name == "id")


jobs = sa.Table(
    "jobs",
    metadata,
    *[_column(field) for field in dataclasses.fields(Job)],
    sa.Column("request_hash", sa.Text),
    sa.UniqueConstraint("owner", "idempotency_key"),
    sa.Index("jobs_by_state", "state", "created_at"),
    sa.Index("jobs_by_owner", "owner", "created_at"),
)
rates = sa.Table(
    "rates",
    metadata,
    sa.Column("bucket", sa.Text, primary_key=True),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("count", sa.Integer, nullable=False),
)


def _unexpired(now: Any) -> Any:
    return jobs.c.expires_at.is_(None) | (jobs.c.expires_at > now)


# Made once: SQLAlchemy takes longer to put a statement together than SQLite takes to answer it.
INSERT = jobs.insert()
NAMED = sa.select(jobs).where(jobs.c.owner == sa.bindparam("owner_"), jobs.c.idempotency_key == sa.bindparam("key_"))
OF_OWNER = sa.func.count().filter(jobs.c.owner == sa.bindparam("owner_"))
QUEUED = sa.select(sa.func.count(), OF_OWNER).select_from(jobs).where(jobs.c.state == "queued")
VISIBLE = sa.select(jobs).where(jobs.c.id == sa.bindparam("id_"), _unexpired(sa.bindparam("now_")))


class QueueFull(SmartdiffError):
    """No more jobs are taken at present. field: which limit it was."""

    def __init__(self, field: str, limit: int, message: str):
        self.field, self.limit = field, limit
        super().__init__(message)


def check_room(waiting: int, of_owner: int, max_queued: int, max_of_owner: int) -> None:
    """Raises QueueFull where so many jobs wait, in all and of one owner, that no more may come."""
    if waiting >= max_queued:
        raise QueueFull("max_queued", max_queued, f"{max_queued} jobs are waiting already")
    if of_owner >= max_of_owner:
        raise QueueFull("max_queued of the key", max_of_owner, f"{max_of_owner} jobs of yours are waiting already")


class IdempotencyConflict(SmartdiffError):
    """The key was used before, for another request."""


class JobStore:
    """The table of jobs.

    ttl: how many seconds a finished job is kept. clock: for tests.
    """

    def __init__(self, url: str, ttl: float = 86_400.0, clock: Callable[[], float] = time.time):
        """Raises InvalidConfig for a URL that names no database, or one that cannot be opened."""
        self.ttl, self._clock = ttl, clock
        self._writer = threading.Lock()
        try:
            parsed = sa.make_url(url)
            self._is_sqlite = parsed.get_backend_name() == "sqlite"
            options = {"timeout": BUSY_SECONDS} if self._is_sqlite else {}
            self._db = sa.create_engine(parsed, connect_args=options, pool_pre_ping=not self._is_sqlite)
            if self._is_sqlite:
                event.listen(self._db, "connect", _wal)
                event.listen(self._db, "begin", _begin)
            metadata.create_all(self._db)
            found = {column["name"] for column in sa.inspect(self._db).get_columns("jobs")}
        except (ArgumentError, OperationalError, ImportError) as error:
            remedy = f"cannot be opened ({_first_line(error)}); write sqlite:///jobs.db or postgresql+psycopg://user@host/name"
            raise InvalidConfig("store", url, remedy) from error
        if found != set(jobs.columns.keys()):
            raise InvalidConfig("store", url, "was made by another version of smartdiff_jax; give a new one")

    def close(self) -> None:
        self._db.dispose()

    def submit(self, job: Job, request_hash: str = "", max_queued: int = 2**31, max_of_owner: int = 2**31) -> tuple[Job, bool]:
        """Record a job; returns it, or the one its idempotency key already names, and whether it is new.

        Raises QueueFull, IdempotencyConflict.
        """
        name, row = {"owner_": job.owner, "key_": job.idempotency_key}, dataclasses.asdict(job) | {"request_hash": request_hash}
        with self._changing() as connection:
            if job.idempotency_key is not None and (found := connection.execute(NAMED, name).one_or_none()) is not None:
                return self._same(found, request_hash), False
            waiting, of_owner = connection.execute(QUEUED, {"owner_": job.owner}).one()
            check_room(waiting, of_owner, max_queued, max_of_owner)
            if job.idempotency_key is None:
                connection.execute(INSERT, row)
                return job, True
            with contextlib.suppress(IntegrityError), connection.begin_nested():
                connection.execute(INSERT, row)
                return job, True
            return self._same(connection.execute(NAMED, name).one(), request_hash), False  # another host was first

    def knows(self, owner: str, idempotency_key: str) -> bool:
        """Whether a job was made by that key. A look, which waits for no writer."""
        with self._reading() as connection:
            return connection.execute(NAMED, {"owner_": owner, "key_": idempotency_key}).first() is not None

    def _same(self, row: sa.Row, request_hash: str) -> Job:
        if row.request_hash != request_hash:
            raise IdempotencyConflict(f"this key belongs to {row.id}, which was another request")
        return _job(row)

    def get(self, job_id: str) -> Job | None:
        with self._reading() as connection:
            row = connection.execute(VISIBLE, {"id_": job_id, "now_": self._clock()}).one_or_none()
        return None if row is None else _job(row)

    def page(
        self,
        *,
        owner: str | None = None,
        api: str | None = None,
        states: Collection[State] | None = None,
        limit: int = 100,
        after: str | None = None,
        newest_first: bool = True,
    ) -> list[Job]:
        """A page of jobs, by the time they came; `after` is the last one of the page before."""
        query = sa.select(jobs).where(self._visible()).limit(limit)
        direction = sa.desc if newest_first else sa.asc
        query = query.order_by(direction(jobs.c.created_at), direction(jobs.c.id))
        if owner is not None:
            query = query.where(jobs.c.owner == owner)
        if api is not None:
            query = query.where(jobs.c.api == api)
        if states is not None:
            query = query.where(jobs.c.state.in_(states))
        with self._reading() as connection:
            if after is not None:
                last = connection.execute(sa.select(jobs.c.created_at, jobs.c.id).where(jobs.c.id == after)).one_or_none()
                if last is None:
                    return []
                here, there = sa.tuple_(jobs.c.created_at, jobs.c.id), sa.tuple_(*map(sa.literal, last))
                query = query.where(here < there if newest_first else here > there)
            return [_job(row) for row in connection.execute(query)]

    def waiting(self) -> list[Job]:
        """What an engine may claim: queued jobs, and those of engines that have fallen silent."""
        with self._reading() as connection:
            rows = connection.execute(sa.select(jobs).where(self._claimable()).order_by(jobs.c.created_at))
            return [_job(row) for row in rows]

    def claim(self, job_id: str, engine: str) -> Job | None:
        """The job, which is this engine's from now on; None if another was faster, or if it must not be begun again."""
        now = self._clock()
        with self._changing() as connection:
            wanted = (jobs.c.id == job_id) & self._claimable()
            if connection.execute(self._end(wanted & jobs.c.cancel_requested, "cancelled")).rowcount:
                return None
            poisoned = wanted & (jobs.c.attempts >= MAX_ATTEMPTS)
            if connection.execute(self._end(poisoned, "failed", error=POISONED)).rowcount:
                return None
            values = {
                "state": "running",
                "stage": "text",
                "engine": engine,
                "lease_until": now + LEASE_SECONDS,
                "started_at": sa.func.coalesce(jobs.c.started_at, now),
                "attempts": jobs.c.attempts + 1,
            }
            if not connection.execute(jobs.update().where(wanted).values(values)).rowcount:
                return None
            return _job(connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one())

    def heartbeat(self, engine: str, ids: Collection[str]) -> dict[str, tuple[bool, Priority]]:
        """Renew the leases of these; returns those that are the engine's, and whether each is to be cancelled, its priority."""
        mine = (jobs.c.engine == engine) & (jobs.c.state == "running") & jobs.c.id.in_(ids)
        with self._changing() as connection:
            connection.execute(jobs.update().where(mine).values(lease_until=self._clock() + LEASE_SECONDS))
            rows = connection.execute(sa.select(jobs.c.id, jobs.c.cancel_requested, jobs.c.priority).where(mine))
            return {job_id: (bool(cancelled), priority) for job_id, cancelled, priority in rows}

    def progress(self, job_id: str, engine: str, *, got_further: bool = False, **values: Any) -> bool:
        """Set `stage`, `done`, `total`, `device_seconds`, `previews_made`; False if the job is this engine's no more.

        got_further: what is done by now will not be done again, so that its attempts count from one.
        """
        if got_further:
            values["attempts"] = 1
        return self._change(job_id, "running", engine=engine, **values)

    def finish(self, job_id: str, engine: str, state: State, **values: Any) -> bool:
        """End a running job; False if it is this engine's no more, and then whoever has it will end it."""
        mine = (jobs.c.id == job_id) & (jobs.c.engine == engine) & (jobs.c.state == "running")
        with self._changing() as connection:
            return connection.execute(self._end(mine, state, **values)).rowcount == 1

    def release(self, job_id: str, engine: str) -> bool:
        """Give a running job back to the queue, unharmed."""
        values = {"state": "queued", "stage": "queued", "lease_until": None, "attempts": 0}
        with self._changing() as connection:
            mine = (jobs.c.id == job_id) & (jobs.c.engine == engine) & (jobs.c.state == "running")
            return connection.execute(jobs.update().where(mine).values(engine=None, **values)).rowcount == 1

    def cancel(self, job_id: str) -> Job | None:
        """A queued job ends at once, a running one when its engine hears of it; a finished one stays as it is."""
        with self._changing() as connection:
            this = jobs.c.id == job_id
            connection.execute(self._end(this & (jobs.c.state == "queued"), "cancelled"))
            connection.execute(jobs.update().where(this & (jobs.c.state == "running")).values(cancel_requested=True))
        return self.get(job_id)

    def reprioritise(self, job_id: str, priority: Priority) -> bool:
        """For a job that is not finished."""
        return self._change(job_id, "queued", "running", priority=priority)

    def forget(self, job_id: str) -> None:
        """Let a job end and expire now: nobody sees it any more, and the next sweep removes it and its files."""
        self.cancel(job_id)
        with self._changing() as connection:
            connection.execute(jobs.update().where(jobs.c.id == job_id).values(expires_at=self._clock()))

    def expired(self) -> list[str]:
        """Finished jobs whose time is over; remove their files, then `remove` them."""
        query = sa.select(jobs.c.id).where(jobs.c.state.in_(FINAL), jobs.c.expires_at <= self._clock())
        with self._reading() as connection:
            return list(connection.execute(query).scalars())

    def remove(self, job_id: str) -> None:
        with self._changing() as connection:
            connection.execute(jobs.delete().where(jobs.c.id == job_id))

    def count(self, owner: str | None = None) -> dict[State, int]:
        """Jobs by state."""
        query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
        if owner is not None:
            query = query.where(jobs.c.owner == owner)
        with self._reading() as connection:
            return {state: number for state, number in connection.execute(query)}

    def load_rates(self) -> dict[str, tuple[float, int]]:
        """Measured seconds by bucket, and how many measurements they are the mean of."""
        with self._reading() as connection:
            return {bucket: (seconds, count) for bucket, seconds, count in connection.execute(sa.select(rates))}

    def save_rates(self, changed: dict[str, tuple[float, int]]) -> None:
        with self._changing() as connection:
            for bucket, (seconds, count) in changed.items():
                connection.execute(rates.delete().where(rates.c.bucket == bucket))
                connection.execute(rates.insert().values(bucket=bucket, seconds=seconds, count=count))

    def _change(self, job_id: str, *states: State, engine: str | None = None, **values: Any) -> bool:
        query = jobs.update().where(jobs.c.id == job_id, jobs.c.state.in_(states)).values(values)
        if engine is not None:
            query = query.where(jobs.c.engine == engine)
        with self._changing() as connection:
            return connection.execute(query).rowcount == 1

    def _claimable(self) -> Any:
        now = self._clock()
        over = (jobs.c.lease_until < now) | (jobs.c.lease_until > now + IMPOSSIBLE_SECONDS)
        return (jobs.c.state == "queued") | ((jobs.c.state == "running") & over)

    def _visible(self) -> Any:
        return _unexpired(self._clock())

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sa.Connection]:
        """A transaction that writes. SQLite has one writer: threads wait here, where they are woken at once and hold no
        connection that a reader may want, and not in SQLite, which looks again after ever longer sleeps."""
        with self._writer if self._is_sqlite else contextlib.nullcontext(), self._db.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """Readers of SQLite take no lock, so that they never wait for a writer."""
        with self._db.connect().execution_options(reading=True) as connection:
            yield connection

    def _end(self, which: Any, state: State, **values: Any) -> Any:
        now = self._clock()
        values |= {"stage": state, "state": state, "finished_at": now, "engine": None, "lease_until": None}
        # A job that was forgotten while it ran has expired already.
        return jobs.update().where(which).values(expires_at=sa.func.coalesce(jobs.c.expires_at, now + self.ttl), **values)


def _begin(connection: sa.Connection) -> None:
    # A writer takes the lock at once: one that read first could not wait for it any more.
    connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("reading") else "BEGIN IMMEDIATE")


def _wal(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy begins the transactions, not Python's sqlite3
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")  # an accepted job outlives a power cut


def _job(row: sa.Row) -> Job:
    fields = dict(row._mapping)
    fields.pop("request_hash")
    return Job(**fields | {"files": tuple(fields["files"]), "cancel_requested": bool(fields["cancel_requested"])})


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
