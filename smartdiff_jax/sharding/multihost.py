"""Several hosts, one process each: host 0 leads, the others do what it sends.

JAX connects the devices (jax.distributed, on the coordinator's port). Commands go another way, over a TCP connection to each
follower on the port after it: a follower may wait for hours without a collective, and a host that is lost shows as a closed
connection at once, while a collective with it would wait for ever. Where the host itself is gone and cannot close anything,
TCP keepalive does, in about KEEPALIVE seconds. The network is trusted, as jax.distributed trusts it.
"""

import atexit
import functools
import io
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from smartdiff_jax.config.system import HostsConfig
from smartdiff_jax.errors import HostLost, InvalidConfig

T = TypeVar("T")
Command = tuple[dict[str, Any], dict[str, np.ndarray]]
"""What is to be done, as JSON, and the arrays that go with it."""

CONNECT_SECONDS = 300
KEEPALIVE = 30
GRACE_SECONDS = 5.0
"""How long an error of the runtime is held back: where it came from a lost host, that is known soon after."""
SHUTDOWN_SECONDS = 20


def fetch(array: jax.Array) -> np.ndarray:
    """The whole array on every host; all of them must call it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    sharding = array.sharding
    assert isinstance(sharding, NamedSharding)
    return np.asarray(_gather(NamedSharding(sharding.mesh, PartitionSpec()))(array))


@functools.lru_cache
def _gather(whole: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(_same, out_shardings=whole)


def _same(x: jax.Array) -> jax.Array:
    return x


class Leader:
    """Host 0: sends commands, and notices who is lost."""

    def __init__(self, hosts: HostsConfig):
        """Waits until all hosts are there. Raises HostLost where they do not come, InvalidConfig for a port in use."""
        self.hosts = hosts
        self._changed = threading.Condition()
        self._lost: HostLost | None = None
        self._closing = False
        self._work: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._order = threading.RLock()
        try:
            server = socket.create_server(("", hosts.port + 1))
        except OSError as error:
            raise InvalidConfig("hosts.coordinator", hosts.coordinator, f"port {hosts.port + 1}: {error.strerror}") from None
        with server:
            _connect_devices(hosts, 0)
            self._followers = self._accept(server)
        for number, connection in self._followers.items():
            threading.Thread(target=self._watch, args=(number, connection), daemon=True).start()
        # Daemons: a thread that waits for a lost host must not keep the process.
        threading.Thread(target=self._worker, daemon=True).start()
        atexit.register(self.close)

    def _accept(self, server: socket.socket) -> dict[int, Connection]:
        followers: dict[int, Connection] = {}
        until = time.monotonic() + CONNECT_SECONDS
        while len(followers) < self.hosts.count - 1:
            server.settimeout(max(0.1, until - time.monotonic()))
            try:
                accepted, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, self.hosts.count)) - followers.keys())
                raise HostLost(f"hosts {missing} did not connect within {CONNECT_SECONDS} s") from None
            connection = _connection(accepted)
            followers[json.loads(connection.recv_bytes())["host"]] = connection
        return followers

    def send(self, command: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """To all followers. Raises HostLost."""
        message = _encode(command, arrays or {})
        with self._order:
            for number, connection in self._followers.items():
                self._check()
                try:
                    connection.send_bytes(message)
                except OSError:
                    self._lose(number, "its process ended")
        self._check()

    def run(self, function: Callable[[], T], command: Mapping[str, Any]) -> T:
        """function(), computed with the followers, whom the command tells so; on several threads, in one order on all hosts.

        Raises HostLost as soon as one is lost, whatever the function waits for.
        """
        future: Future[T] = Future()
        future.add_done_callback(self._notify)
        with self._order:
            self.send(command)
            self._work.put((future, function))
        with self._changed:
            self._changed.wait_for(lambda: future.done() or self._lost is not None)
            if future.done() and isinstance(future.exception(), Exception) and _is_of_runtime(future.exception()):
                self._changed.wait_for(lambda: self._lost is not None, timeout=GRACE_SECONDS)
        self._check()
        return future.result()

    def close(self) -> None:
        """Ends the followers. After a loss it ends this process too, with 2: what waits for a lost host cannot be ended."""
        if self._closing:
            return
        idle: Future[None] = Future()
        self._work.put((idle, lambda: None))  # a command that was interrupted is finished together
        with self._changed:
            idle.add_done_callback(self._notify)
            self._changed.wait_for(lambda: idle.done() or self._lost is not None, timeout=SHUTDOWN_SECONDS)
            self._closing = idle.done() and self._lost is None
        if not self._closing:
            _leave(2)
        message = _encode({"kind": "stop"}, {})
        for connection in self._followers.values():
            try:
                connection.send_bytes(message)
            except OSError:
                _leave(2)
        jax.distributed.shutdown()

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _notify(self, future: Future | None = None) -> None:
        with self._changed:
            self._changed.notify_all()

    def _lose(self, number: int, why: str) -> None:
        with self._changed:
            if self._lost is None and not self._closing:
                self._lost = HostLost(f"host {number} is lost: {why}. Start all {self.hosts.count} hosts again")
            self._changed.notify_all()

    def _watch(self, number: int, connection: Connection) -> None:
        """A follower says something only when it fails."""
        try:
            why = connection.recv_bytes().decode()
        except (EOFError, OSError):
            why = "its process ended"
        self._lose(number, why)

    def _worker(self) -> None:
        while (item := self._work.get()) is not None:
            future, function = item
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)


class Follower:
    """Any other host: takes commands, and ends with the leader."""

    def __init__(self, hosts: HostsConfig, number: int):
        if not 1 <= number < hosts.count:
            raise InvalidConfig("host", number, f"followers are numbered 1 to {hosts.count - 1}; 0 leads")
        self.number = number
        _connect_devices(hosts, number)
        try:
            connected = socket.create_connection((hosts.address, hosts.port + 1), timeout=CONNECT_SECONDS)
        except OSError as error:
            raise HostLost(f"the leader at {hosts.address}:{hosts.port + 1} does not answer: {error.strerror}") from None
        connected.settimeout(None)
        self._connection = _connection(connected)
        self._connection.send_bytes(json.dumps({"host": number}).encode())
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def commands(self) -> Iterator[Command]:
        """Until the leader stops. Where the leader is lost the process ends, with 2."""
        while True:
            command = self._commands.get()
            if command[0]["kind"] == "stop":
                jax.distributed.shutdown()
                return
            yield command

    def fail(self, error: BaseException) -> NoReturn:
        """Tells the leader why, and ends the process."""
        print(f"error: host {self.number}: {error}", file=sys.stderr, flush=True)
        try:
            self._connection.send_bytes(f"{type(error).__name__}: {error}".encode())
        finally:
            _leave(2)

    def _read(self) -> None:
        stopped = False
        while not stopped:
            try:
                command = _decode(self._connection.recv_bytes())
            except (EOFError, OSError):
                print(f"error: host {self.number}: the leader is lost", file=sys.stderr, flush=True)
                _leave(2)
            stopped = command[0]["kind"] == "stop"
            self._commands.put(command)


def _connect_devices(hosts: HostsConfig, number: int) -> None:
    if jax.distributed.is_initialized():
        raise InvalidConfig("hosts", hosts.coordinator, "this process is connected to hosts already; start another")
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.count,
            number,
            initialization_timeout=CONNECT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except RuntimeError as error:
        raise InvalidConfig("hosts", hosts.coordinator, f"the hosts cannot connect: {error}") from None
    jax.device_count()  # each host waits here until all have told their devices, and not in the middle of something


def _connection(connected: socket.socket) -> Connection:
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", KEEPALIVE // 2), ("TCP_KEEPINTVL", KEEPALIVE // 6), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # not on macOS
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return Connection(connected.detach())


def _encode(command: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    named: dict[str, Any] = {f"array.{name}": array for name, array in arrays.items()}
    np.savez(buffer, **named, command=np.array(json.dumps(command)))
    return buffer.getvalue()


def _decode(message: bytes) -> Command:
    with np.load(io.BytesIO(message), allow_pickle=False) as parts:
        arrays = {name.removeprefix("array."): parts[name] for name in parts.files if name != "command"}
        return json.loads(str(parts["command"])), arrays


def _is_of_runtime(error: BaseException | None) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError | ValueError)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
