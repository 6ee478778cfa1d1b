"""Goldens of the image pipelines, by diffusers' own pipelines over the folders of tests/tiny_images.py.

Run in an environment with torch, diffusers and transformers: python tests/golden/make_image_pipelines.py [FAMILY ...]
"""

import json
import sys
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from safetensors import safe_open

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny_images  # noqa: E402


def module(family: str, component: str):
    library, named = tiny_images.FAMILIES[family]["components"][component]
    config = tiny_images.config_of(family, component)
    cls = getattr(
        diffusers if library == "diffusers" else transformers,
        tiny_images.FAMILIES[family]["components"][component][1]["_class_name"],
    )
    if library == "diffusers":
        return cls.from_config(config)
    settings = transformers.AutoConfig.for_model(**config)
    return cls(settings)


def saved_keys(family: str, component: str) -> dict[str, list[int]]:
    """Names and shapes as save_pretrained writes them."""
    with tempfile.TemporaryDirectory() as folder:
        module(family, component).save_pretrained(folder)
        [file] = Path(folder).glob("*.safetensors")
        with safe_open(file, "np") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}


def packed(latents: torch.Tensor) -> torch.Tensor:
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpacked(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    h, w = height // 16, width // 16
    return tokens.view(tokens.shape[0], h, w, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, 2 * h, 2 * w)


def call_of(family: str, case: dict, latents: torch.Tensor) -> dict:
    """Arguments in each pipeline's own form."""
    width, height = case["size"]
    call = dict(prompt=tiny_images.PROMPT, width=width, height=height, num_inference_steps=case["num_inference_steps"])
    if family == "flux1":
        return call | dict(latents=packed(latents), guidance_scale=case.get("guidance_scale", 3.5))
    if family == "flux2-klein":
        b, c, h, w = latents.shape
        folded = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
        return call | dict(latents=folded, guidance_scale=1.0)
    if family == "qwen-image":
        return call | dict(latents=packed(latents), true_cfg_scale=case["guidance_scale"], negative_prompt=tiny_images.NEGATIVE)
    return call | dict(latents=latents, guidance_scale=case["guidance_scale"], negative_prompt=tiny_images.NEGATIVE)


def main(families: list[str]) -> None:
    keys = json.loads(tiny_images.KEYS.read_text()) if tiny_images.KEYS.is_file() else {}
    for family in families:
        for component in tiny_images.FAMILIES[family]["components"]:
            keys[f"{family}/{component}"] = saved_keys(family, component)
    tiny_images.KEYS.write_text(json.dumps(keys, indent=0))
    for family in families:
        arrays = {}
        with tempfile.TemporaryDirectory() as folder:
            path = tiny_images.write_folder(Path(folder) / family, family)
            pipe = diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=torch.float32)
            pipe.set_progress_bar_config(disable=True)
            for number, case in enumerate(tiny_images.CASES[family]):
                latents = torch.from_numpy(tiny_images.noise(case["size"]))
                steps = []

                def keep(pipe, index, timestep, tensors, steps=steps):
                    # Not output_type="latent": FLUX.2 hands those back de-normalised.
                    steps.append(tensors["latents"])
                    return tensors

                pixels = pipe(**call_of(family, case, latents), output_type="np", callback_on_step_end=keep).images
                arrays[f"{number}/pixels"] = np.round(pixels * 65535).astype(np.uint16)
                width, height = case["size"]
                last = steps[-1] if steps[-1].ndim == 4 else unpacked(steps[-1], height, width)
                arrays[f"{number}/latents"] = last.numpy()
        np.savez_compressed(HERE / f"image_pipeline_{family}.npz", **arrays)
        print(family, {key: (value.shape, float(value.std())) for key, value in arrays.items()})


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1:] or list(tiny_images.FAMILIES))
