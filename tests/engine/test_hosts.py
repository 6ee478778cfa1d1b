"""Several hosts, as processes on this one: the output of one process, cancelling, and what a lost host leads to."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from leader import REQUEST, save_and_resume

from smartdiff_jax.config.system import HostsConfig, MeshConfig, SystemConfig
from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.sharding.mesh import make_mesh
from smartdiff_jax.sharding.multihost import Follower, _decode, _encode

LEADER = Path(__file__).with_name("leader.py")
FOLLOW = "from smartdiff_jax.cli import main; main()"
LEADS_AND_ENDS = """
import sys
import jax, numpy as np
from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.sharding.multihost import Leader
leader = Leader(SystemConfig.from_file(sys.argv[2]).hosts)
assert leader.run(lambda: jax.device_count(), {"kind": "nothing"}) == 2
"""
PATIENCE = 500
"""Seconds for processes to start and compile; how soon a loss shows is asserted by itself."""
SOON = 30


class Hosts:
    """A leader and its followers."""

    def __init__(self, folder, where, mesh, count, devices):
        port = free_ports()
        self.out, self.where = where / "out.npz", where
        fields = {"mesh": mesh, "dtype": "float32", "cache_dir": str(where / "cache")}
        config = where / "mesh.yaml"
        config.write_text(yaml.safe_dump(fields | {"hosts": {"coordinator": f"127.0.0.1:{port}", "count": count}}))
        commands = [[str(LEADER), str(folder), str(config), str(self.out)]]
        commands += [["-c", FOLLOW, "follow", str(number), "--config", str(config)] for number in range(1, count)]
        env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        self.logs = [where / f"host{number}.log" for number in range(count)]
        self.processes = []
        for command, log in zip(commands, self.logs, strict=True):
            with log.open("w") as file:
                run = subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=env)
            self.processes.append(run)

    def wait_for(self, text):
        """Until the leader has printed it."""
        until = time.monotonic() + PATIENCE
        while text not in self.said(0):
            gone = [number for number, process in enumerate(self.processes) if process.poll() is not None]
            assert not gone and time.monotonic() < until, [gone, *(self.said(n)[-2000:] for n in range(len(self.logs)))]
            time.sleep(0.1)

    def said(self, number):
        return self.logs[number].read_text()

    def ends(self, number):
        """Its exit code; soon."""
        return self.processes[number].wait(SOON)

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()


def free_ports():
    """The first of two free ports in a row."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
            return port


@pytest.fixture
def start(folder, tmp_path):
    started = []

    def run(mesh, count, devices):
        started.append(Hosts(folder, tmp_path, mesh, count, devices))
        return started[-1]

    yield run
    for hosts in started:
        hosts.kill()


def test_two_hosts_and_a_lost_follower(start, pipe):
    hosts = start(dict(ring=2, ulysses=2), count=2, devices=2)
    hosts.wait_for("saved\n")
    hosts.wait_for("denoise 4\n")
    assert "cancelled\n" in hosts.said(0)
    hosts.processes[1].send_signal(signal.SIGKILL)
    assert hosts.ends(0) == 2
    said = hosts.said(0)
    assert "error: host 1 is lost: its process ended" in said and "Traceback" not in said, said
    one = pipe(**REQUEST)
    with np.load(hosts.out) as found:
        for name in ("latents", "frames"):
            expected = getattr(one, name)
            assert np.linalg.norm(found[name] - expected) <= 1e-5 * np.linalg.norm(expected)
        np.testing.assert_array_equal(found["again"], found["frames"])
        np.testing.assert_array_equal(found["resumed"], found["frames"])
        expected = save_and_resume(pipe)[1]
        assert expected.std() > 1 and np.abs(found["preview"].astype(int) - expected).max() <= 1
        assert list(found["steps"]) == one.report.steps


def test_three_hosts_and_a_lost_leader(start):
    hosts = start(dict(data=3), count=3, devices=1)
    hosts.wait_for("text 0\n")
    hosts.processes[0].send_signal(signal.SIGKILL)
    for number in (1, 2):
        assert hosts.ends(number) != 0
        # JAX notices at the same moment, and may end the process first.
        assert any(said in hosts.said(number) for said in ("the leader is lost", "coordination"))


def test_followers_end_with_the_leader(start, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LEADER", "-c" + LEADS_AND_ENDS)
    hosts = start(dict(data=2), count=2, devices=1)
    assert [process.wait(PATIENCE) for process in hosts.processes] == [0, 0], (hosts.said(0), hosts.said(1))


def test_commands_carry_arrays():
    command = {"kind": "request", "params": {"prompt": "ü", "seed": None}}
    arrays = {"latents": np.arange(6, dtype=np.float32).reshape(2, 3)}
    found, with_it = _decode(_encode(command, arrays))
    assert found == command and with_it.keys() == arrays.keys()
    np.testing.assert_array_equal(with_it["latents"], arrays["latents"])


@pytest.mark.parametrize("hosts", [dict(coordinator="here", count=2), dict(coordinator="a:1", count=1), dict(count=2)])
def test_hosts_are_checked(hosts):
    with pytest.raises(InvalidConfig, match="hosts"):
        SystemConfig.create(hosts=hosts)


def test_a_follower_has_a_number():
    hosts = HostsConfig(coordinator="[::1]:99", count=2)
    assert (hosts.address, hosts.port) == ("::1", 99)
    with pytest.raises(InvalidConfig, match="host=2.*1 to 1"):
        Follower(hosts, 2)


def test_every_host_takes_part(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InvalidConfig, match=r"mesh=4: leaves hosts \[1\] without work"):
        make_mesh(MeshConfig(ring=4))
