"""The peer: diffusers' transformer and VAE of one picture model, eager and with its blocks compiled. Prints one line of JSON.

Told what to run by `benchmarks/images.py`, as JSON: the components' numbers and the sizes of the inputs.
"""

import argparse
import gc
import json
import statistics
import time

import diffusers
import torch
from torch import nn

CLASSES = {
    "flux1-dev": ("FluxTransformer2DModel", "AutoencoderKL"),
    "flux2-klein-4b": ("Flux2Transformer2DModel", "AutoencoderKLFlux2"),
    "qwen-image": ("QwenImageTransformer2DModel", "AutoencoderKLQwenImage"),
    "z-image": ("ZImageTransformer2DModel", "AutoencoderKL"),
}
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)

IN_A_ROW = 0.5
"""Seconds of calls that are waited for together, as `measure.IN_A_ROW` has them."""


def build(kind: type[nn.Module], numbers: dict) -> nn.Module:
    """A model of random weights, every parameter cast as it is made: 20 billion in float32 would not fit."""
    hook = nn.modules.module.register_module_parameter_registration_hook(
        lambda module, key, parameter: None if parameter is None else nn.Parameter(parameter.data.to(DTYPE))
    )
    try:
        with torch.device(DEVICE):
            return kind(**numbers).to(DTYPE).eval()
    finally:
        hook.remove()


def inputs(task: dict) -> dict:
    """What the pipeline hands the transformer at a step, for one branch."""
    _, channels, frames, height, width = task["latents"]
    numbers, length, rows, columns = task["transformer"], task["text_length"], height // 2, width // 2

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=DTYPE, device=DEVICE)

    tokens = random(1, rows * columns, 4 * channels)
    half = torch.tensor([0.5], device=DEVICE, dtype=DTYPE)
    if task["name"] == "z-image":
        text = random(length, numbers["cap_feat_dim"])
        return {"x": [random(channels, frames, height, width)], "t": half, "cap_feats": [text]}
    shared = {
        "hidden_states": tokens,
        "encoder_hidden_states": random(1, length, numbers["joint_attention_dim"]),
        "timestep": half,
    }
    if task["name"] == "qwen-image":
        return shared | {"img_shapes": [[(frames, rows, columns)]]}
    axes = 4 if task["name"] == "flux2-klein-4b" else 3
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    img_ids, txt_ids = torch.zeros(rows * columns, axes, device=DEVICE), torch.zeros(length, axes, device=DEVICE)
    img_ids[:, 1:3] = grid.to(DEVICE, torch.float32)
    if axes == 4:
        txt_ids[:, 3] = torch.arange(length, device=DEVICE)
        return shared | {"img_ids": img_ids, "txt_ids": txt_ids}
    told = {"pooled_projections": random(1, numbers["pooled_projection_dim"]), "guidance": torch.full_like(half, 3.5)}
    return shared | {"img_ids": img_ids, "txt_ids": txt_ids} | told


def measured(call, repeats: int) -> dict:
    """Median, least and most seconds of a call, of as many in a row as half a second holds, and the peak of memory of all."""

    def seconds(calls: int) -> float:
        synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        return (time.perf_counter() - began) / calls

    seconds(2)
    calls = max(1, round(IN_A_ROW / seconds(1)))
    times = [seconds(calls) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
    return {"seconds": {"median": statistics.median(times), "min": min(times), "max": max(times)}, "peak_gb": peak}


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def forget_peak() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def of_transformer(name: str, task: dict, repeats: int) -> dict:
    """One forward pass, eager and compiled, and both branches where there are two."""
    model, told = build(getattr(diffusers, name), task["transformer"]), inputs(task)

    def forward():
        return model(**told, return_dict=False)[0]

    def both_branches():
        """As Qwen-Image's pipeline combines them; a branch costs the same in Z-Image's."""
        positive, negative = (out[0] if isinstance(out, list) else out for out in (forward(), forward()))
        guided = negative + 4.0 * (positive - negative)
        return guided * (torch.norm(positive, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True))

    forget_peak()
    results = {"forward_eager": measured(forward, repeats)}
    began = time.perf_counter()
    for blocks in model.children() if CUDA else ():  # on a CPU it would take minutes, and nobody is to compare with it
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.compile()
    forward()
    synchronize()
    results["compile_s"] = time.perf_counter() - began
    forget_peak()
    results["forward"] = measured(forward, repeats)
    if task["branches"] == 2:
        results["both_branches"] = measured(both_branches, repeats)
    return results


def of_vae(name: str, task: dict, repeats: int) -> dict:
    """One decode, as it is and with cuDNN's search."""
    vae = build(getattr(diffusers, name), task["vae"])
    _, channels, frames, height, width = task["latents"]
    shape = (1, channels, frames, height, width) if name == "AutoencoderKLQwenImage" else (1, channels, height, width)
    latents = torch.randn(shape, dtype=DTYPE, device=DEVICE)
    forget_peak()
    results = {"vae_decode": measured(lambda: vae.decode(latents, return_dict=False)[0], repeats)}
    torch.backends.cudnn.benchmark = True
    results["vae_decode_searched"] = measured(lambda: vae.decode(latents, return_dict=False)[0], repeats)
    return results


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=json.loads)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    transformer, vae = CLASSES[arguments.task["name"]]
    results: dict = {"versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}}
    results |= of_transformer(transformer, arguments.task, arguments.repeats)
    results |= of_vae(vae, arguments.task, arguments.repeats)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
