"""The peer: diffusers' WanTransformer3DModel, eager and with its blocks compiled. Prints one line of JSON."""

import argparse
import json
import statistics
import time

import diffusers
import torch
from diffusers import WanTransformer3DModel


def seconds(call, repeats: int) -> dict:
    """Median, least and most seconds of a call, by device events, after two warm-up calls."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    numbers = dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    frames, rows, columns = 21, 60, 104
    if arguments.tiny:
        numbers, (frames, rows, columns) = dict(num_attention_heads=2, ffn_dim=128, num_layers=2), (2, 8, 12)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = WanTransformer3DModel(**numbers).to(torch.bfloat16).eval()
        for name in ("condition_embedder.time_embedder", "scale_shift_table"):  # what from_pretrained keeps in float32
            for key, parameter in model.named_parameters():
                if name in key:
                    parameter.data = parameter.data.float()
        latents = torch.randn(1, 16, frames, rows, columns, dtype=torch.bfloat16)
        text = torch.randn(1, 512, 4096, dtype=torch.bfloat16)
        timestep = torch.tensor([500.0])

    @torch.no_grad()
    def forward():
        return model(latents, timestep, text, return_dict=False)[0]

    results: dict = {"versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}}
    results["eager_s"] = seconds(forward, arguments.repeats)
    began = time.perf_counter()
    for block in model.blocks:
        block.compile()
    forward()
    torch.cuda.synchronize()
    results["compile_s"] = time.perf_counter() - began
    results["compiled_s"] = seconds(forward, arguments.repeats)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
