"""A request with a trace: scopes of all stages in it, the largest costs told, and what cannot be written refused at once."""

import gzip
import json
import sys

import jax
import pytest
import tiny

from smartdiff_jax.cli import main
from smartdiff_jax.engine.profiling import Kernel, _kind, by_kind, largest_costs, slices


@pytest.fixture(autouse=True)
def as_before():
    """What the command asks of JAX's cache is for its own process."""
    with_metadata = jax.config.jax_compilation_cache_include_metadata_in_key
    yield
    jax.config.update("jax_compilation_cache_include_metadata_in_key", with_metadata)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["smartdiff", "generate", "a red fox", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0


def test_a_profile_has_every_stage_block_and_attention(tmp_path, monkeypatch, capsys):
    folder, config = tiny.write_folder(tmp_path / "tiny-wan"), tmp_path / "system.yaml"
    config.write_text(f"cache_dir: {tmp_path / 'cache'}\n")
    trace, arguments = tmp_path / "new" / "fox.json.gz", ["-m", folder, "--config", config, "-o", tmp_path / "fox.webp"]
    small = ["--size", "32x32", "--num-frames", "5", "--steps", "2", "--seed", "1"]
    assert run(monkeypatch, *arguments, *small, "--profile", trace) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(tmp_path / "fox.webp"), str(trace)]
    assert "denoise/model/block" in err and "decode" in err and "share" in err
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    (pid,) = (e["pid"] for e in events if e.get("args", {}).get("name") == "scopes of CPU")
    found = [e for e in events if e.get("pid") == pid and e["ph"] == "X"]
    names = {e["name"] for e in found}
    assert {"text", "denoise", "model", "block", "self_attention", "attention", "sampler", "decode"} <= names
    # Perfetto nests slices of a row by their times: whatever overlaps is one inside the other.
    ends: list[int] = []
    spans = [(round(1e3 * e["ts"]), round(1e3 * e["ts"]) + round(1e3 * e["dur"])) for e in found]
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        ends = [other for other in ends if other > start]
        assert not ends or end <= ends[-1]
        ends.append(end)


@pytest.mark.parametrize(
    "path, words",
    [
        ("fox.json", "must end in .json.gz"),
        ("/proc/nowhere/fox.json.gz", "cannot be written"),
        ("folder.json.gz", "it is a folder"),
        ("both.json.gz", "--compare-cache makes two"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_loads(tmp_path, monkeypatch, capsys, path, words):
    (tmp_path / "folder.json.gz").mkdir()
    more = ["--cache", "auto", "--compare-cache"] if path.startswith("both") else []
    assert run(monkeypatch, "-m", "no-such-model", "--profile", tmp_path / path, *more) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "name, primitive, scope, kind",
    [
        ("ncclDevKernel_SendRecv", "", (), "messages"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "", (), "attention"),
        ("mosaic_gpu_kernel_5", "custom_call", ("block", "attention"), "attention"),
        ("mosaic_gpu_kernel_5", "custom_call", ("block", "feed_forward"), "other"),
        ("forward", "triton_kernel_call", ("block", "attention"), "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "", (), "convolutions"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "", (), "matmuls"),
        ("loop_convert_fusion", "convert_element_type", ("block",), "other"),
        ("ynn_fusion.3", "dot_general", ("block",), "matmuls"),
    ],
)
def test_kernels_are_told_by_their_names_then_by_what_they_compute(name, primitive, scope, kind):
    assert _kind(name, primitive, scope) == kind


def kernel(scope, start, duration, name="op", kind="other", device="GPU:0"):
    return Kernel(device, name, kind, tuple(scope.split("/")) if scope else (), start, duration)


def test_costs_and_slices_by_hand():
    kernels = [
        kernel("denoise/block/attention", 0e6, 2e6, "a", "attention"),
        kernel("denoise/block", 2e6, 1e6, "b"),
        kernel("", 3e6, 1e6, "copy"),
        kernel("denoise/block/attention", 5e6, 2e6, "a", "attention"),  # the next turn of the loop
        kernel("decode", 7e6, 4e6, "c", "convolutions"),
    ]
    assert slices(kernels) == [
        ("attention", 0e6, 2e6),
        ("block", 0e6, 3e6),
        ("attention", 5e6, 7e6),
        ("block", 5e6, 7e6),
        ("denoise", 0e6, 7e6),
        ("decode", 7e6, 11e6),
    ]
    first, second, *_ = largest_costs([*kernels, kernel("denoise/block_7/attention", 12e6, 4e6, "d", "attention")])
    assert (first.scope, first.kind, first.calls, first.seconds) == ("denoise/block/attention", "attention", 3, 0.008)
    assert second.scope == "decode" and second.share == pytest.approx(4 / 14)
    row = by_kind(kernels)["GPU:0"]
    assert row["attention"] == 4 and row["convolutions"] == 4 and row["other"] == 2 and row["idle"] == 1 and row["span"] == 11
