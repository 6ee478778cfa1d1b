"""docs/performance.md and its plots, out of the results that are committed: nothing in it is written by hand.

    python benchmarks/report.py                                      of one H100
    python benchmarks/report.py --device cpu-x86-64 --into /tmp/x    of another device, as result files name it

What was not measured is said to be missing. tests/benchmarks/test_report.py holds the committed page against this.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import RESULTS  # noqa: E402
from smartdiff_jax.evaluation.plot import bar_plot  # noqa: E402

DEVICE = "nvidia-h100-80gb-hbm3"
MODELS = ("wan2.1-t2v-1.3b", "flux1-dev", "flux2-klein-4b", "qwen-image", "z-image")
PEERS = ("diffusers", "cache-dit")
STAGES = ("text", "denoise", "decode", "media")
KINDS = {
    "attention": ("attention",),
    "matmuls": ("matmuls",),
    "the rest": ("other", "convolutions", "memcpy, memset", "messages"),
    "idle": ("idle",),
}
"""What the report calls kernels, by profiling.KINDS."""

STAGES_PLOT, STEP_PLOT = "performance-stages.svg", "performance-step.svg"
NOT_MEASURED = "not measured"

HEAD = """# Performance

Made by `python benchmarks/report.py` out of `benchmarks/results/*-{device}.json`, not by hand.
One {name}, {dtype}, batch 1, weights random and of the true sizes, each model's default size and guidance. A row's peer ran
in the same call. Medians; the files hold the spread. Ratios are the peer's seconds over ours: above 1 we are faster. How the
measurements are made is told at the head of each script; `smartdiff bench --compare` holds two results against each other.
"""


class Results:
    """The result files of one device, by the benchmark's name. {} where there is none."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device

    def __call__(self, name: str) -> dict[str, Any]:
        file = self.folder / f"{name}-{self.device}.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def source(self, name: str, commits: Iterable[str | None]) -> str:
        """Where numbers are from, and of which commits."""
        told = ", ".join(dict.fromkeys(commit or "unknown" for commit in commits))
        return f"`benchmarks/results/{name}-{self.device}.json`, commits {told}."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def median(row: Mapping[str, Any] | None) -> float | None:
    """Seconds of a timing, whether it stands alone or beside others; None where there is none."""
    found = (row or {}).get("seconds", row) or {}
    return found.get("median")


def cell(seconds: float | None, digits: int = 2) -> str:
    return NOT_MEASURED if seconds is None else f"{seconds:.{digits}f}"


def milliseconds(seconds: float | None) -> str:
    return NOT_MEASURED if seconds is None else f"{1e3 * seconds:.1f}"


def ratio(peer: float | None, ours: float | None) -> str:
    return NOT_MEASURED if peer is None or ours is None else f"{peer / ours:.2f}"


def to_pixels(row: Mapping[str, Any] | None) -> float | None:
    """Seconds of all but the writing of a file, which peers do not do."""
    return median((row or {}).get("pixels") or (row or {}).get("total"))


def peer_settings(one: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Of all peers of a model, by peer and setting."""
    found = {peer: one.get(peer, {}).get("settings", {}) for peer in PEERS}
    return {f"{peer}, {name}": row for peer, rows in found.items() for name, row in rows.items()}


def end_to_end(results: Results) -> list[str]:
    """From the prompt to the pixels and the file: seconds in all, and by stage."""
    found = results("end-to-end").get("models", {})
    rows, by_stage = [], []
    for model in (*MODELS, *(name for name in found if name not in MODELS)):
        if model not in found:
            rows.append([model, NOT_MEASURED, *[""] * 7])
            continue
        one = found[model]
        peers = one.get("diffusers", {}).get("settings", {})
        compiled, eager = (to_pixels(peers.get(name)) for name in ("compiled", "eager"))
        for name, row in one["ours"].get("settings", {"": one["ours"]}).items():
            if "total" not in row:
                why = row.get("unsupported") or row.get("error", "")
                rows.append([_what(model, one), f"{name}: {why[:100]}", *[""] * 7])
                continue
            pixels, skipped = to_pixels(row), f"{row['skipped']:.0%}" if row["skipped"] else ""
            rows.append(
                [_what(model, one), name, cell(pixels), ratio(compiled, pixels), ratio(eager, pixels)]
                + [cell(median(row["total"])), f"{row['peak_gb']:.1f}", skipped, f"{row['of_product']:.0%}"]
            )
            by_stage.append([model, name, *(cell(median(row["stages"].get(stage)), 3) for stage in STAGES)])
        for name, row in peer_settings(one).items():
            skipped = f"{row['skipped']:.0%}" if row.get("skipped") else ""
            rows.append([_what(model, one), name, cell(to_pixels(row)), "", "", "", f"{row['peak_gb']:.1f}", skipped, ""])
            by_stage.append([model, name, *(cell(median(row["stages"].get(stage)), 3) for stage in STAGES[:3]), ""])
    head = ["model", "kernel, cache", "prompt to pixels, s", "to compiled", "to eager", "to the file, s", "peak, GB", "skipped"]
    lines = ["## From the prompt to the picture", "", *table([*head, "of a product"], rows), ""]
    if by_stage:
        lines += [*table(["model", "kernel, cache", *(f"{stage}, s" for stage in STAGES)], by_stage), ""]
        lines.append(results.source("end-to-end", (one["stamp"]["commit"] for one in found.values() if one["stamp"])))
    lines += [
        "The peak is of all that was on the device so far. Of a product: what denoising reaches of the TFLOP/s of a product of",
        "two 8192 x 8192 matrices in the same process, by the model's own arithmetic. What caches and 8-bit kernels cost in",
        "quality is in [caches](cache.md) and [kernels](kernels.md); random weights cannot tell.",
    ]
    return lines


def _what(model: str, one: Mapping[str, Any]) -> str:
    sampling = one["problem"]["sampling"]
    frames = f"x{sampling['num_frames']}" if one["problem"]["task"] == "t2v" else ""
    return f"{model} {sampling['width']}x{sampling['height']}{frames}, {sampling['num_inference_steps']} steps"


def forward(results: Results) -> list[str]:
    """One evaluation of the denoiser, and a step of both branches."""
    rows, sources = [], []
    wan = results("denoise")
    if wan:
        ours, peer = median(wan["forward_s"]), wan.get("diffusers", {})
        compiled, eager = median(peer.get("compiled_s")), median(peer.get("eager_s"))
        rows.append([wan["shape"].removesuffix(", batch 1"), *_against(ours, compiled, eager), "", ""])
        sources.append(results.source("denoise", [wan["stamp"]["commit"]]))
    else:
        rows.append(["wan2.1-t2v-1.3b", NOT_MEASURED, *[""] * 6])
    found = results("images").get("models", {})
    for model in MODELS[1:]:
        if model not in found:
            rows.append([model, NOT_MEASURED, *[""] * 6])
            continue
        ours, peer = found[model]["ours"], found[model].get("diffusers", {})
        for part, name in (("forward", model), ("both_branches", f"{model}, both branches")):
            if part in ours:
                compiled, eager = median(peer.get(part)), median(peer.get(f"{part}_eager"))
                memory = ours[part]["arguments_gb"] + ours[part]["above_arguments_gb"]
                peak = f"{peer[part]['peak_gb']:.1f}" if part in peer else NOT_MEASURED
                rows.append([name, *_against(median(ours[part]), compiled, eager), f"{memory:.1f}", peak])
    if found:
        sources.append(results.source("images", (one["stamp"]["commit"] for one in found.values())))
    head = ["one evaluation of the denoiser", "ours, ms", "diffusers compiled, ms", "eager, ms", "to compiled", "to eager"]
    head += ["memory, GB", "diffusers, GB"]
    return ["## The denoiser", "", *table(head, rows), "", *sources, "Memory: the compiler's account, and the peer's peak."]


def eight_bits(results: Results) -> list[str]:
    """The denoiser with the blocks' products in fp8, and attention in 8 bits."""
    found, rows = results("precision"), []
    for model, kinds in found.get("models", {}).items():
        full = median(kinds.get("full"))
        for kind, row in kinds.items():
            seconds, error = median(row), row.get("relative_error_of_velocity")
            memory = f"{row['arguments_gb'] + row['above_arguments_gb']:.1f}"
            rows.append(
                [model, kind, milliseconds(seconds), ratio(full, seconds), memory, "" if error is None else f"{error:.3f}"]
            )
    if not rows:
        return ["## The denoiser in 8 bits", "", f"{NOT_MEASURED.capitalize()}."]
    head = ["model", "precision", "ms", "full over it", "memory, GB", "relative error of the velocity"]
    told = [results.source("precision", [found["stamp"]["commit"]]), f"Of the file: {found['stamp'].get('note', '')}."]
    return ["## The denoiser in 8 bits", "", *table(head, rows), "", *told]


def _against(ours: float | None, compiled: float | None, eager: float | None) -> list[str]:
    """Cells of a row: no peer runs both branches eagerly, which is no gap."""
    told = ("", "") if eager is None else (milliseconds(eager), ratio(eager, ours))
    return [milliseconds(ours), milliseconds(compiled), told[0], ratio(compiled, ours), told[1]]


def other_stages(results: Results) -> list[str]:
    """Text encoders and decoders by themselves."""
    rows, sources = [], []
    encoders = results("encode").get("models", {})
    for model in MODELS:
        one = encoders.get(model, {})
        ours, peer = median(one.get("ours", {}).get("encode")), median(one.get("transformers", {}).get("encode"))
        rows.append([model, "text", milliseconds(ours), milliseconds(peer), ratio(peer, ours)])
    if encoders:
        sources.append(results.source("encode", [results("encode")["stamp"]["commit"]]))
    decoders = {model: one for model, one in results("images").get("models", {}).items() if "vae_decode" in one["ours"]}
    found = {model: (one["ours"]["vae_decode"], one.get("diffusers", {}).get("vae_decode")) for model, one in decoders.items()}
    vae = results("vae")
    if vae:
        found[MODELS[0]] = vae["layouts"]["taps"]["decode"], vae.get("diffusers", {}).get("decode")
        sources.append(results.source("vae", [vae["stamp"]["commit"]]))
    for model in MODELS:
        ours, peer = (median(one) for one in found.get(model, (None, None)))
        rows.append([model, "decode", milliseconds(ours), milliseconds(peer), ratio(peer, ours)])
    head = ["model", "stage", "ours, ms", "transformers, diffusers, ms", "ratio"]
    return ["## Text and pixels", "", *table(head, rows), "", *sources, "Decoders of pictures: `images-…json`."]


def starts(results: Results) -> list[str]:
    """The first picture of a fresh process."""
    rows = []
    found = results("end-to-end").get("models", {})
    for model in MODELS:
        for name, told in (("cold_start", "nothing compiled"), ("second_start", "all compiled, on disk")):
            row = found.get(model, {}).get(name)
            if not row or "error" in row:
                rows.append([model, told, NOT_MEASURED, *[""] * 4])
                continue
            parts = [row["imports_s"] + row["device_s"], row["weights_s"], row["request_s"]["total"]]
            without = row["process_to_first_picture_s"] - row["request_s"]["total"]
            rows.append([model, told, cell(row["process_to_first_picture_s"], 1), *(cell(n, 1) for n in (*parts, without))])
    head = ["model", "", "process to its first file, s", "imports, device", "weights", "the request", "all before it"]
    note = "Weights are made, where a real start reads them ([loading](measured.md#loading))."
    return ["## The first picture", "", *table(head, rows), "", note]


def where(results: Results) -> tuple[list[str], dict[str, Any]]:
    """Where the time goes: bars of the stages, and of a step. What each plot needs, by its file."""
    stages, totals, steps, step_totals = {}, {}, {}, {}
    for model, one in results("end-to-end").get("models", {}).items():
        for name, row in (*one["ours"].get("settings", {}).items(), *peer_settings(one).items()):
            label = ", ".join([model, *(part.replace("_ratio", "") for part in name.split(", ") if part != "auto")])
            if row.get("stages"):
                stages[label] = {stage: median(row["stages"][stage]) for stage in STAGES if stage in row["stages"]}
                totals[label] = f"{sum(stages[label].values()):.2f} s"
            if row.get("step_ms"):
                steps[label] = {part: sum(row["step_ms"].get(kind, 0.0) for kind in kinds) for part, kinds in KINDS.items()}
                step_totals[label] = f"{sum(steps[label].values()):.0f} ms"
    wan = results("denoise")
    if wan and "forward_without_attention_s" in wan and MODELS[0] not in steps:
        label = f"{MODELS[0]}, one evaluation"
        whole, rest = 1e3 * wan["forward_s"]["median"], 1e3 * wan["forward_without_attention_s"]["median"]
        steps[label], step_totals[label] = {"attention": whole - rest, "all without attention": rest}, f"{whole:.0f} ms"
    lines, plots = ["## Where the time goes", ""], {}
    for file, bars, ends, title in (
        (STAGES_PLOT, stages, totals, "From the prompt to the file, by stage"),
        (STEP_PLOT, steps, step_totals, "A step, by kernels"),
    ):
        if bars:
            plots[file] = bars, title, ends
            lines += [f"![{title}]({file})", ""]
        else:
            lines += [f"{title}: {NOT_MEASURED}.", ""]
    missing = [model for model in MODELS if not any(label.startswith(model) for label in steps)]
    if missing:
        lines.append(f"Of a step {NOT_MEASURED}: {', '.join(missing)}.")
    lines.append("A step's kernels are those of a trace, all branches of guidance together; idle is when none ran.")
    return lines, plots


def render(results: Results, into: Path) -> Path:
    """Writes the page and its plots into a folder."""
    found = [results(name) for name in ("end-to-end", "images", "denoise", "precision", "encode", "vae")]
    name = next((one["stamp"]["device"] for one in found if one), results.device)
    lines, plots = where(results)
    sections = [end_to_end(results), forward(results), eight_bits(results), lines, other_stages(results), starts(results)]
    dtype = "float32" if results.device.startswith("cpu") else "bfloat16"
    page = HEAD.format(device=results.device, name=name, dtype=dtype)
    page += "".join("\n" + "\n".join(section) + "\n" for section in sections)
    into.mkdir(parents=True, exist_ok=True)
    for file, (bars, title, totals) in plots.items():
        bar_plot(into / file, bars, title, totals)
    (into / "performance.md").write_text(page)
    return into / "performance.md"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args(given)
    print(render(Results(arguments.results, arguments.device), arguments.into))


if __name__ == "__main__":
    main()
