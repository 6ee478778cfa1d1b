"""LPIPS and Fréchet distances against lpips and torchmetrics, flow against motion that is known, and the command."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from smartdiff_jax import cli
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.evaluation.clip_score import ClipScore
from smartdiff_jax.evaluation.files import read_media
from smartdiff_jax.evaluation.flow import motion, warping_error, warping_errors
from smartdiff_jax.evaluation.frechet import frechet_distance, read_features
from smartdiff_jax.evaluation.lpips import NETWORKS, Lpips
from smartdiff_jax.evaluation.metrics import flicker

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
make_distances, make_clip_score = (importlib.import_module(name) for name in ("make_distances", "make_clip_score"))
sys.path.remove(str(GOLDEN))
EXPECTED_CLIP = json.loads((GOLDEN / "clip_score.json").read_text())
EXPECTED = json.loads((GOLDEN / "distances.json").read_text())


def write_network(folder, name, change=lambda tensors: tensors):
    """The two files of a network, with the weights that its golden was made with."""
    shapes = {key: tuple(shape) for key, shape in EXPECTED["lpips"][name]["shapes"].items()}
    tensors = change(make_distances.weights(shapes))
    save_file({k: v for k, v in tensors.items() if k.startswith("features")}, folder / f"{NETWORKS[name][0]}.safetensors")
    save_file({k: v for k, v in tensors.items() if k.startswith("lin")}, folder / f"lpips_{name}.safetensors")


@pytest.mark.parametrize("name", list(NETWORKS))
def test_lpips_is_that_of_the_package(tmp_path, name):
    write_network(tmp_path, name)
    (network,) = Lpips.read(tmp_path)
    cases = slice(1, None) if name == "vgg" else slice(None)  # each size is compiled
    pairs = [[picture[None] for picture in make_distances.pair(*case)] for case in make_distances.CASES[cases]]
    assert [network(a, b) for a, b in pairs] == pytest.approx(EXPECTED["lpips"][name]["values"][cases], abs=1e-4)
    a, b = pairs[0]
    assert network(np.concatenate([a, b]), np.concatenate([b, b])) == pytest.approx(network(a, b) / 2, abs=1e-6)


def write_clip(folder):
    folder.mkdir()
    shutil.copy(GOLDEN / "tokenizers" / "clip" / "tokenizer.json", folder)
    (folder / "config.json").write_text(json.dumps(EXPECTED_CLIP["config"]))
    shapes = {name: tuple(shape) for name, shape in EXPECTED_CLIP["shapes"].items()}
    weights = {name: np.asarray(value) for name, value in make_clip_score.weights(shapes).items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def test_clip_score_is_that_of_transformers(tmp_path):
    score = ClipScore(write_clip(tmp_path / "clip"))
    found = [score(make_distances.pair(*case)[1][None], prompt) for *case, prompt in make_clip_score.CASES]
    assert found == pytest.approx(EXPECTED_CLIP["values"], abs=1e-4)
    picture = make_distances.pair(0, 48, 48, 3.0)[1]
    assert score(np.stack([picture] * 2), "a fox " * 50) == pytest.approx(score(picture[None], "a fox " * 60))  # cut off
    (tmp_path / "clip" / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="holds no tokenizer"):
        ClipScore(tmp_path / "clip")
    with pytest.raises(InvalidRequest, match="give a folder of transformers' CLIPModel"):
        ClipScore(tmp_path)


def test_frechet_is_that_of_torchmetrics():
    for case, expected in zip(make_distances.FEATURES, EXPECTED["fid"], strict=True):
        a, b = make_distances.features(*case)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-4)
        assert frechet_distance(a, a) == pytest.approx(0, abs=1e-4)


def test_frechet_by_hand():
    """In one dimension (m1 - m2)^2 + (s1 - s2)^2."""
    a, b = np.array([[0.0], [2.0]]), np.array([[3.0], [7.0]])
    assert frechet_distance(a, b) == pytest.approx(16 + 2)


def scene(size, *places):
    """Frames of one smooth texture, each seen from another place: exact at any fraction of a pixel."""
    waves = np.random.RandomState(0).uniform(-0.7, 0.7, (12, 2)), np.random.RandomState(1).uniform(0, 6, 12)
    rows, columns = np.mgrid[:size, :size].astype(float)
    frames = []
    for down, right in places:
        phase = sum(np.sin(v * (rows - down) + h * (columns - right) + p) for (v, h), p in zip(*waves, strict=True))
        frames.append(np.repeat(np.round(128 + 9 * phase)[..., None], 3, axis=-1))
    return np.clip(frames, 0, 255).astype(np.uint8)


def test_flow_finds_motion_and_warping_sees_flicker_alone():
    still, moved = scene(96, (0, 0), (0, 0)), scene(96, (0, 0), (3.5, -2.25))
    ((flow, told),) = motion(moved)
    inside = np.asarray(flow)[16:-16, 16:-16]
    assert np.abs(inside - np.array([3.5, -2.25])).max() < 0.5 and np.median(np.abs(inside - np.array([3.5, -2.25]))) < 0.1
    assert 0.7 < np.mean(told) < 1  # what has left the picture is not told
    assert warping_error(still, motion(still)) == 0
    brighter = moved.copy()
    brighter[1] = np.clip(brighter[1] + 25.0, 0, 255).astype(np.uint8)
    found = warping_errors(moved, brighter, [(flow, told)])
    assert warping_error(moved, [(flow, told)]) < 2e-4 and flicker(moved) > 0.02
    assert found["warping_error"] == pytest.approx((25 / 255) ** 2, rel=0.1)
    assert found["warping_change"] == pytest.approx(found["warping_error"], abs=2e-4)


def results(folder, noise, seconds):
    folder.mkdir()
    for seed in range(3):
        picture = make_distances.pair(seed, 48, 40, noise)[1]
        Image.fromarray(picture).save(folder / f"prompt-{seed}.png")
        report = {"seconds": {"text": 0.5, "denoise": seconds + seed}, "params": {"prompt": f"a red fox {seed}"}}
        (folder / f"prompt-{seed}.json").write_text(json.dumps(report))
    np.save(folder / "fid.npy", np.random.RandomState(int(noise)).standard_normal((8, 4)))
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["smartdiff", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_speed_quality_and_distances_by_the_command(tmp_path, monkeypatch, capsys):
    full, near, far = (results(tmp_path / name, *told) for name, *told in (("full", 0, 8), ("near", 2, 4), ("far", 30, 2)))
    write_network(tmp_path, "alex")
    clip = write_clip(tmp_path / "clip")
    plot, out = tmp_path / "plot.svg", tmp_path / "out.json"
    arguments = [full, near, far, "--lpips", tmp_path, "--plot", plot, "--plot-metric", "lpips_alex", "-o", out, "--warping"]
    arguments += ["--clip", clip]
    assert run(monkeypatch, *arguments) == 0
    told = json.loads(out.read_text())
    assert told[0]["pairs"]["prompt-1"]["seconds"] == 5.5 and told[0]["means"]["speed_up"]["mean"] == pytest.approx(
        np.mean([8.5 / 4.5, 9.5 / 5.5, 10.5 / 6.5])
    )
    first, score = told[0]["pairs"]["prompt-1"], ClipScore(clip)
    assert first["clip_score"] == pytest.approx(score(read_media(near / "prompt-1.png"), "a red fox 1"))
    assert first["clip_score_change"] == first["clip_score"] - score(read_media(full / "prompt-1.png"), "a red fox 1")
    assert 0 < told[0]["means"]["lpips_alex"]["mean"] < told[1]["means"]["lpips_alex"]["mean"]
    a, b = (read_features(place / "fid.npy") for place in (full, near))
    assert told[0]["distances"] == {"fid": pytest.approx(frechet_distance(a, b))}
    assert plot.read_text().count("<circle") == 2 and ">near</text>" in plot.read_text()
    assert "speed_up" in (printed := capsys.readouterr().out) and "lpips_alex" in printed and "fid" in printed


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda full, near: (near / "prompt-0.json").unlink(), "results without a report beside them"),
        (lambda full, near: (near / "prompt-0.json").write_text("[]"), "is no report of"),
        (lambda full, near: np.save(near / "fid.npy", np.zeros((8, 5))), "take one network for both"),
        (lambda full, near: np.save(near / "fid.npy", np.zeros(8)), "must hold finite floats"),
        (lambda full, near: (near / "fid.npy").write_text("nothing"), "write it by numpy.save"),
        (lambda full, near: [(near / f"prompt-{n}.png").write_bytes((full / f"prompt-{n}.png").read_bytes()) for n in range(3)],
         "has no finite one; choose one of ssim"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_one_line(tmp_path, monkeypatch, capsys, break_it, words):
    full, near = results(tmp_path / "full", 0, 8), results(tmp_path / "near", 2, 4)
    break_it(full, near)
    assert run(monkeypatch, full, near, "--plot", tmp_path / "plot.svg", "--plot-metric", "psnr") == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_wrong_weights_are_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="alexnet.safetensors with lpips_alex.safetensors"):
        Lpips.read(tmp_path)
    write_network(tmp_path, "alex", lambda tensors: tensors | {"features.3.bias": np.zeros(4, np.float32)})
    with pytest.raises(InvalidRequest, match=r"features.3.bias must be \(192,\) and is \(4,\)"):
        Lpips.read(tmp_path)
    write_network(tmp_path, "alex")
    (network,) = Lpips.read(tmp_path)
    with pytest.raises(InvalidRequest, match="lpips='64x31': needs at least 32"):
        network(np.zeros((1, 31, 64, 3), np.uint8), np.zeros((1, 31, 64, 3), np.uint8))
