"""`smartdiff mesh` as an operator meets it: plans of the ready files, proposals that are files, errors of one line."""

import sys
from pathlib import Path

import pytest

from smartdiff_jax.cli import main
from smartdiff_jax.config.system import MeshConfig, SystemConfig
from smartdiff_jax.engine import planning

EXAMPLES = Path(__file__).parents[1] / "examples"
WAN = ["-m", "wan2.1-t2v-1.3b", "--size", "832x480x81"]


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """What a command counts of a model at a size is counted once for all commands."""
    count, counted = planning.workload, {}

    def workload(model, size=None):
        key = model.spec.name, model.dtype, size
        if key not in counted:
            counted[key] = count(model, size)
        return counted[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "workload", workload)
        yield


@pytest.fixture
def smartdiff(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["smartdiff", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
            raise SystemExit(0)  # what the command itself ends with
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("mesh-*gpu.yaml")), ids=lambda file: file.stem)
def test_ready_files(smartdiff, file):
    devices = int(file.stem.removeprefix("mesh-").removesuffix("gpu"))
    assert SystemConfig.from_file(file).mesh.num_devices == devices
    assert sum(line.startswith("#") for line in file.read_text().splitlines()) == 1
    code, out, err = smartdiff("mesh", "check", file, *WAN)
    assert code == 0, err
    assert f"{devices} device" in out and "fits 80 GB" in out


def test_all_sizes_are_there():
    assert {file.name for file in EXAMPLES.glob("mesh-*.yaml")} == {f"mesh-{n}gpu.yaml" for n in (1, 2, 4, 8, 16)}


def test_check_prints_the_plan(smartdiff):
    code, out, err = smartdiff("mesh", "check", EXAMPLES / "mesh-8gpu.yaml", *WAN, "--memory", "8")
    assert code == 0, err
    rows = [line.split(None, 1) for line in out.splitlines()]
    labels = [label for label, _ in rows]
    for label in ("mesh", "tokens", "heads", "transformer", "text_encoder", "vae", "ulysses", "cfg", "step", "attention"):
        assert label in labels
    assert "32,760 and 512 of text; 8,190 a device" in out and "3 of 12 a device" in out
    assert "does not fit 8 GB" in out and "x one device" in out
    assert dict(rows)["transformer"].strip() == "2.84 GB"


def test_check_in_float32_predicts_no_time(smartdiff, tmp_path):
    file = tmp_path / "mesh.yaml"
    file.write_text("mesh: {ring: 2}\ndtype: float32\n")
    code, out, err = smartdiff("mesh", "check", file, "-m", "pocket-video")
    assert code == 0, err
    assert "not predicted" in out and "float32" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--devices", "8", *WAN],
        ["--devices", "4", "-m", "flux1-dev", "--memory", "20"],
        ["--devices", "1", *WAN],
        ["--devices", "1", "-m", "flux1-dev", "--memory", "24"],
    ],
)
def test_a_proposal_is_a_file_that_passes(smartdiff, tmp_path, arguments):
    code, out, err = smartdiff("mesh", "plan", *arguments)
    assert code == 0, err
    file = tmp_path / "mesh.yaml"
    file.write_text(out)
    mesh = SystemConfig.from_file(file).mesh
    assert mesh.num_devices == int(arguments[1]) and 12 % mesh.ulysses == 0
    reasons = [line for line in out.splitlines() if line.startswith("# ")]
    assert "a step takes" in out and len(reasons) >= 3
    model = arguments[arguments.index("-m") + 1]
    memory = arguments[arguments.index("--memory") + 1] if "--memory" in arguments else "80"
    code, checked, err = smartdiff("mesh", "check", file, "-m", model, "--memory", memory)
    assert code == 0, err
    assert f"fits {memory} GB" in checked


def test_a_proposal_says_why(smartdiff):
    _, out, _ = smartdiff("mesh", "plan", "--devices", "8", *WAN)
    assert "# slower: " in out and "# impossible: ulysses=8 (must divide the model's 12 heads)" in out
    _, out, _ = smartdiff("mesh", "plan", "--devices", "2", "-m", "flux1-dev", "--memory", "20")
    assert "# too big: " in out and "fsdp: true" in out


def test_one_component_at_a_time_where_nothing_else_fits(smartdiff):
    """FLUX.1 on a card of 24 GB; with room for all there is no word of it."""
    code, out, err = smartdiff("mesh", "plan", "--devices", "1", "-m", "flux1-dev", "--memory", "24")
    assert code == 0, err
    assert (
        "\nresidency: stage" in out and "# no mesh holds all components at once" in out and "# too big: one device 37." in out
    )
    _, out, _ = smartdiff("mesh", "plan", "--devices", "1", "-m", "flux1-dev", "--memory", "80")
    assert "residency" not in out and "at once" not in out
    # Where several devices hold everything with their weights cut, that is the better way.
    _, out, _ = smartdiff("mesh", "plan", "--devices", "4", "-m", "flux1-dev", "--memory", "20")
    assert "residency" not in out and "fsdp: true" in out


def test_a_proposal_for_several_outputs(smartdiff):
    _, out, _ = smartdiff("mesh", "plan", "--devices", "4", *WAN, "--outputs", "4")
    assert "for 4 outputs, 4.00x one device" in out and "data: 4" in out


@pytest.mark.parametrize(
    "content, arguments, words",
    [
        ("mesh: {ulysses: 8}", WAN, ["mesh.ulysses=8", "12 heads", "ring=2 ulysses=4"]),
        ("mesh: {cfg: 2}", ["-m", "flux1-dev"], ["mesh.cfg=2", "no negative branch"]),
        ("mesh: {cfg: 3}", WAN, ["mesh.cfg=3"]),
        ("mesh: {rings: 2}", WAN, ["mesh.rings=2", "unknown field"]),
        ("mesh: {fsdp: true}", WAN, ["mesh.fsdp=True"]),
        ("attention: fast", WAN, ["attention='fast'", "xla"]),
        ("mesh: {ring: 2}", ["-m", "no-such-model"], ["model='no-such-model'", "flux1-dev"]),
        ("mesh: {ring: 2}", ["-m", "flux1-dev", "--size", "1024x1024x9"], ["num_frames=9"]),
        ("mesh: {ring: 2}", ["-m", "flux1-dev", "--size", "1000x1024"], ["1000x1024", "divide by 16"]),
        (None, WAN, ["config=", "cannot be read"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(smartdiff, tmp_path, content, arguments, words):
    file = tmp_path / "mesh.yaml"
    if content is not None:
        file.write_text(content)
    code, out, err = smartdiff("mesh", "check", file, *arguments)
    assert code == 2 and out == "", err
    assert len(err.strip().splitlines()) == 1
    assert all(word in err for word in words), err


def test_no_mesh_fits(smartdiff):
    code, out, err = smartdiff("mesh", "plan", "--devices", "2", "-m", "wan2.2-t2v-a14b", "--memory", "8")
    assert code == 2 and out == "" and "memory=8.0" in err and "use more devices" in err and "residency=stage" in err


def test_files_are_read_by_every_command():
    """A mesh file is a whole system configuration: `generate --config` takes it too."""
    assert SystemConfig.from_file(EXAMPLES / "mesh-16gpu.yaml").mesh == MeshConfig(cfg=2, ring=2, ulysses=4)
