"""Results held against each other: the rule, what cannot be compared, and a kernel that was slowed on purpose."""

import importlib.util
import json
from pathlib import Path

import jax
import pytest

from smartdiff_jax import cli
from smartdiff_jax.kernels import ATTENTION

ROOT = Path(__file__).parents[2]
STAMP = {"device": "card", "device_count": 1, "platform": "gpu", "commit": "a", "date": "today"}


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seconds(median, least, most):
    return {"median": median, "min": least, "max": most}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `smartdiff bench --compare` on two results: (exit code, what it printed)."""

    def run(before, after):
        files = [tmp_path / "before.json", tmp_path / "after.json"]
        for file, found in zip(files, (before, after), strict=True):
            file.write_text(found if isinstance(found, str) else json.dumps({"stamp": STAMP} | found))
        monkeypatch.setattr("sys.argv", ["smartdiff", "bench", "--compare", *map(str, files)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, " ".join("".join(capsys.readouterr()).split())

    return run


@pytest.mark.parametrize(
    "before, after, verdict",
    [
        (seconds(1.00, 0.99, 1.5), seconds(1.10, 1.09, 1.2), "slower"),  # the outlier of the first hides nothing
        (seconds(1.00, 0.95, 1.01), seconds(1.10, 1.04, 1.2), ""),  # lower halves: 0.05 and 0.06
        (seconds(1.00, 0.95, 1.01), seconds(1.12, 1.06, 1.2), "slower"),
        (seconds(1.000, 0.999, 1.001), seconds(1.029, 1.028, 1.03), ""),  # another card does that
        (seconds(1.000, 0.999, 1.001), seconds(1.032, 1.031, 1.04), "slower"),
        (seconds(1.10, 1.09, 1.2), seconds(1.00, 0.99, 1.5), "faster"),
        (2.0, 9.0, "no spread"),
        ({"median": 2.0, "p95": 3.0}, {"median": 9.0, "p95": 10.0}, "no spread"),
    ],
)
def test_the_rule(command, before, after, verdict):
    code, told = command({"forward_s": before}, {"forward_s": after})
    assert code == (verdict == "slower")
    median = [one["median"] if isinstance(one, dict) else one for one in (before, after)]
    assert f"forward_s {median[0]:g} {median[1]:g} {median[1] / median[0]:.3f} {verdict}".strip() in told


def test_rows_peers_and_what_one_file_lacks(command):
    """Rows of a list pair up by what they are called; a peer is shown and not judged."""
    slow, fast = seconds(3.0, 2.9, 3.1), seconds(1.0, 0.99, 1.1)
    rows = [{"name": "none", "ratio": 0.5, "seconds": fast}, {"name": "auto", "seconds": slow}]
    before = {"rows": rows, "diffusers": {"forward": {"seconds": fast}}, "gone": {"seconds": fast}, "steps": 4}
    after = {"rows": rows[::-1], "diffusers": {"forward": {"seconds": slow}}, "added_s": 1.0, "steps": 4}
    code, told = command(before, after)
    assert code == 0 and "rows/none 0.5/seconds 1 1 1.000" in told and "rows/auto/seconds 3 3 1.000" in told
    assert "diffusers/forward/seconds 1 3 3.000 peer" in told
    assert "before.json: gone/seconds" in told and "after.json: added_s" in told


@pytest.mark.parametrize(
    "after, words",
    [
        ({"stamp": STAMP | {"device": "other card"}, "forward_s": 1.0}, "device is 'other card', that of"),
        ({"benchmark": "vae", "forward_s": 1.0}, "benchmark is 'vae', that of"),
        ({"models": {"wan": {"steps": 20}}, "forward_s": 1.0}, "models/wan/steps is 20, that of"),
        ({"decode_s": 1.0}, "shares no timing with"),
        ("nothing", "cannot be read"),
        ('{"forward_s": 1.0}', "it has no stamp"),
    ],
)
def test_what_cannot_be_compared(command, after, words):
    code, told = command({"benchmark": "denoise", "models": {"wan": {"steps": 50}}, "forward_s": 1.0}, after)
    assert code == 2 and words in told


def test_a_slowed_kernel_is_caught(tmp_path, monkeypatch, command):
    """The tool itself on its tiny shapes, then once more with a kernel that does everything 60 times."""
    attention, files = load("attention"), [tmp_path / name for name in ("xla.json", "slowed.json")]
    arguments = ["--tiny", "--kernel", "xla", "--output"]
    attention.main([*arguments, str(files[0])])
    xla = ATTENTION["xla"]

    def slowed(q, k, v, **options):
        again = jax.lax.fori_loop(0, 60, lambda _, x: xla(x, k, v, **options)[0], q)
        return xla(again, k, v, **options)

    monkeypatch.setattr(attention, "ATTENTION", {"xla": slowed})
    attention.main([*arguments, str(files[1])])
    code, told = command(*(file.read_text() for file in files))
    assert code == 1 and "2 of 2 timings are slower" in told
    code, told = command(files[0].read_text(), files[0].read_text())
    assert code == 0 and "shapes/tiny/xla/seconds" in told
