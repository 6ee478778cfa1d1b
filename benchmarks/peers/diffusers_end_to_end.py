"""The peer: diffusers' pipelines whole, eager and with the transformer's blocks compiled. Prints one line of JSON.

Told what to run by `benchmarks/end_to_end.py`, as JSON (benchmarks/random_model.py: problem). The text encoders run for every
branch of guidance, as the pipeline would run them, and the pipeline is handed states of their shape: random encoders have
no tokenizer. What it gives is the pixels of its default output on the host; no file is written.
"""

import argparse
import json
import statistics
import time

import diffusers
import torch
import transformers
from diffusers_images import CUDA, DEVICE, DTYPE, build, forget_peak, synchronize
from torch import nn
from transformers_encode import TextEncoders

EULER = diffusers.FlowMatchEulerDiscreteScheduler
CLASSES = {
    "wan": (diffusers.WanPipeline, diffusers.WanTransformer3DModel, diffusers.AutoencoderKLWan),
    "flux1": (diffusers.FluxPipeline, diffusers.FluxTransformer2DModel, diffusers.AutoencoderKL),
    "flux2-klein": (diffusers.Flux2KleinPipeline, diffusers.Flux2Transformer2DModel, diffusers.AutoencoderKLFlux2),
    "qwen-image": (diffusers.QwenImagePipeline, diffusers.QwenImageTransformer2DModel, diffusers.AutoencoderKLQwenImage),
    "z-image": (diffusers.ZImagePipeline, diffusers.ZImageTransformer2DModel, diffusers.AutoencoderKL),
}
ENCODERS = {"flux1": ("text_encoder", "text_encoder_2")}
FLOAT32 = {"wan": ("condition_embedder.time_embedder", "scale_shift_table", "norm2")}
"""Parameters that from_pretrained keeps in float32."""


def scheduler(task: dict) -> object:
    sampling = task["sampling"]
    if task["family"] == "wan":
        flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=sampling["shift"])
        return diffusers.UniPCMultistepScheduler(**flow)
    dynamic = sampling["dynamic_shift"]
    if dynamic is None:
        return EULER(shift=sampling["shift"])
    return EULER(use_dynamic_shifting=True, **{name: value for name, value in dynamic.items() if name != "kind"})


class Bench:
    """One pipeline in place."""

    def __init__(self, task: dict):
        self.task = task
        pipeline, transformer, vae = CLASSES[task["family"]]
        parts = {name: build(kind, task["components"][name]) for name, kind in (("transformer", transformer), ("vae", vae))}
        for key, parameter in parts["transformer"].named_parameters():
            if any(name in key for name in FLOAT32.get(task["family"], ())):
                parameter.data = parameter.data.float()
        without = {name: None for encoder in task["text"] for name in (encoder, encoder.replace("text_encoder", "tokenizer"))}
        self.encoders = TextEncoders(task)
        self.pipe = pipeline(scheduler=scheduler(task), **parts, **without)
        self.pipe.set_progress_bar_config(disable=True)
        self.decoded_from = 0.0
        decode = self.pipe.vae.decode

        def timed(*args, **kwargs):
            synchronize()
            self.decoded_from = time.perf_counter()
            return decode(*args, **kwargs)

        self.pipe.vae.decode = timed

    def arguments(self) -> dict:
        """Of the pipeline's call, in its own words."""
        task, sampling, numbers = self.task, self.task["sampling"], self.task["components"]["transformer"]
        call = {name: sampling[name] for name in ("width", "height", "num_inference_steps", "guidance_scale")}
        width = numbers.get("text_dim") or numbers.get("joint_attention_dim") or numbers["cap_feat_dim"]
        length = task["text"][ENCODERS.get(task["family"], ("text_encoder",))[-1]]
        length -= 34 if task["family"] == "qwen-image" else 0  # what the pipeline cuts off the template

        def states() -> torch.Tensor:
            return torch.randn(1, length, width, dtype=DTYPE, device=DEVICE)

        if task["family"] == "wan":
            call |= {"num_frames": sampling["num_frames"], "prompt_embeds": states(), "negative_prompt_embeds": states()}
        elif task["family"] == "flux1":
            pooled = torch.randn(1, numbers["pooled_projection_dim"], dtype=DTYPE, device=DEVICE)
            call |= {"prompt_embeds": states(), "pooled_prompt_embeds": pooled}
        elif task["family"] == "qwen-image":
            mask = torch.ones(1, length, dtype=torch.long, device=DEVICE)
            call |= {"true_cfg_scale": call.pop("guidance_scale"), "prompt_embeds": states(), "prompt_embeds_mask": mask}
            call |= {"negative_prompt_embeds": states(), "negative_prompt_embeds_mask": mask}
        elif task["family"] == "z-image":
            call |= {"prompt_embeds": [states()[0]], "negative_prompt_embeds": [states()[0]]}
        else:
            call |= {"prompt_embeds": states()}
        return call

    def once(self, call: dict) -> dict[str, float]:
        """Seconds in all and by stage."""
        synchronize()
        began = time.perf_counter()
        for _ in range(self.task["branches"]):
            self.encoders()
        synchronize()
        encoded = time.perf_counter()
        self.pipe(**call)
        synchronize()
        done = time.perf_counter()
        stages = {"text": encoded - began, "denoise": self.decoded_from - encoded, "decode": done - self.decoded_from}
        return {"total": done - began} | stages

    def setting(self, repeats: int, whole_warmup: bool = False) -> dict:
        """whole_warmup: where steps are not alike, two do not compile all."""
        call = self.arguments()
        self.once(call if whole_warmup else call | {"num_inference_steps": 2})  # compiles, and searches
        forget_peak()
        runs = [self.once(call) for _ in range(repeats)]
        spread = {
            name: {"seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}}
            for name in runs[0]
            for seconds in [[run[name] for run in runs]]
        }
        peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
        return {"total": spread.pop("total"), "stages": spread, "peak_gb": peak}

    def compile_blocks(self) -> float:
        """Seconds, with a first run of two steps."""
        began = time.perf_counter()
        for blocks in self.pipe.transformer.children():
            if isinstance(blocks, nn.ModuleList):
                for block in blocks:
                    block.compile()
        self.once(self.arguments() | {"num_inference_steps": 2})
        return time.perf_counter() - began


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=json.loads)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-eager", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    modules = (torch, diffusers, transformers)
    results: dict = {"versions": {module.__name__: module.__version__ for module in modules}}
    bench = Bench(arguments.task)
    results["settings"] = {} if arguments.no_eager else {"eager": bench.setting(arguments.repeats)}
    if CUDA:  # on a CPU it would take minutes, and nobody is to compare with it
        results["compile_s"] = bench.compile_blocks()
        results["settings"]["compiled"] = bench.setting(arguments.repeats)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
