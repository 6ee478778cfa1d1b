"""Goldens of the whole text-to-video pipeline, by diffusers' WanPipeline over the folder of tests/tiny.py.

Run in an environment with torch, diffusers and transformers: python tests/golden/make_pipeline.py
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402


def keys() -> dict:
    modules = {
        "transformer": WanTransformer3DModel(**tiny.TRANSFORMER),
        "vae": AutoencoderKLWan(**tiny.VAE),
        "text_encoder": UMT5EncoderModel(UMT5Config(**tiny.TEXT)),
    }
    found = {name: {key: list(value.shape) for key, value in module.state_dict().items()} for name, module in modules.items()}
    # transformers keeps two names for the one embedding, and writes the first only.
    found["text_encoder"].pop("encoder.embed_tokens.weight", None)
    return found


def main() -> None:
    tiny.KEYS.write_text(json.dumps(keys(), indent=0))
    for name, case in tiny.CASES.items():
        arrays = {}
        with tempfile.TemporaryDirectory() as folder:
            tiny.write_folder(Path(folder), two_experts=case["two_experts"], flow_shift=case["flow_shift"])
            part = lambda cls, component: cls.from_pretrained(folder, subfolder=component, torch_dtype=torch.float32)  # noqa: E731, B023
            pipe = WanPipeline(
                tokenizer=PreTrainedTokenizerFast(
                    tokenizer_object=tiny.tiny_tokenizer(), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
                ),
                text_encoder=part(UMT5EncoderModel, "text_encoder"),
                vae=part(AutoencoderKLWan, "vae"),
                scheduler=UniPCMultistepScheduler.from_pretrained(folder, subfolder="scheduler"),
                transformer=part(WanTransformer3DModel, "transformer"),
                transformer_2=part(WanTransformer3DModel, "transformer_2") if case["two_experts"] else None,
                boundary_ratio=0.875 if case["two_experts"] else None,
            )
            pipe.set_progress_bar_config(disable=True)
        width, height = case["size"]
        names = ("num_frames", "num_inference_steps", "guidance_scale", "guidance_scale_2")
        settings = {name: case[name] for name in names if name in case}
        for output in ("latent", "np"):
            result = pipe(
                prompt=tiny.PROMPT,
                negative_prompt="the lazy cat",
                height=height,
                width=width,
                latents=torch.from_numpy(tiny.noise(case["num_frames"], height, width)),
                output_type=output,
                **settings,
            ).frames
            if output == "latent":
                arrays["latents"] = result.numpy()
            else:
                arrays["frames"] = np.round(result * 65535).astype(np.uint16)
        np.savez_compressed(HERE / f"pipeline_{name}.npz", **arrays)
        print(name, {key: (value.shape, float(value.std())) for key, value in arrays.items()})


if __name__ == "__main__":
    with torch.no_grad():
        main()
