"""The command line as a person meets it: what it writes, what it says, and its exit codes."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys

import av
import pytest
import tiny

from smartdiff_jax.cli import main
from smartdiff_jax.config.model import known_models

# A shell's background jobs are started deaf to Ctrl-C, and hand that on; these are to hear it wherever the tests run.
HEAR = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
COMMAND = [sys.executable, "-c", f"{HEAR}; from smartdiff_jax.cli import main; main()"]
SMALL = ["--size", "32x32", "--num-frames", "5", "--steps", "3", "--seed", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("cli") / "tiny-wan")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "system.yaml"
    path.write_text(f"cache_dir: {path.parent / 'cache'}\n")
    return path


def run(*arguments):
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_generate_writes_a_video_and_a_report(folder, config, tmp_path):
    video, report = tmp_path / "new" / "fox.mp4", tmp_path / "report.json"
    code, out, err = run("generate", "a red fox", "-o", video, "-m", folder, *SMALL, "--config", config, "--report", report)
    assert code == 0, err
    assert out.strip() == str(video)
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5
    assert json.loads(report.read_text())["params"]["seed"] == 1
    assert "seed 1" in err and "denoise" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--size", "33x32"], ["size", "33x32", "32x32"]),
        (["--num-frames", "0"], ["num_frames=0"]),
        (["--steps", "10000"], ["num_inference_steps=10000", "200"]),
        (["--guidance-scale", "nan"], ["guidance_scale=nan"]),
        (["--sampler", "euler"], ["sampler='euler'", "flow_euler"]),
        (["--sede", "1"], ["--sede", "--seed"]),
        (["--model", "no-such-model"], ["model='no-such-model'", "pocket-video"]),
        (["--dtype", "float8"], ["dtype='float8'", "bfloat16"]),
        (["-o", "fox.avi"], ["fox.avi", ".mp4"]),
        (["-o", "fox.jpg", "--num-frames", "5"], ["fox.jpg", "frame"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(folder, config, arguments, words, monkeypatch, capsys):
    base = ["generate", "a red fox", "-m", folder, "--config", config]
    monkeypatch.setattr(sys, "argv", ["smartdiff", *map(str, [*base, *arguments])])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2, err
    assert out == ""
    joined = " ".join(err.replace("│", " ").split())
    assert all(word in joined for word in words), err


def test_ctrl_c_stops_and_leaves_nothing(folder, config, tmp_path):
    """In a terminal, as a person has it: elsewhere the bars are drawn only when they are full."""
    arguments = ["generate", "a fox", "-o", tmp_path / "fox.mp4", "-m", folder, "--config", config]
    arguments += ["--size", "64x64", "--num-frames", "17", "--steps", "200"]
    terminal, inside = pty.openpty()
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=inside)
    os.close(inside)
    seen = b""
    while b"denoise" not in seen:
        seen += os.read(terminal, 1024)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # how a terminal says that the other side has closed
        while more := os.read(terminal, 1024):
            seen += more
    process.stdout.close()
    os.close(terminal)
    assert process.wait(timeout=60) == 130, seen
    assert b"nothing was written" in seen and b"Traceback" not in seen
    assert list(tmp_path.iterdir()) == []


def test_models_lists_what_is_known():
    code, out, err = run("models")
    assert code == 0, err
    for spec in known_models().values():
        assert f"{spec.name}  (" in out and spec.state in out


def test_no_arguments_show_the_help():
    code, out, err = run()
    assert "generate" in out + err and "convert" in out + err
