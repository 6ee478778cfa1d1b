"""Makes cache_*.npz with diffusers' cache hooks on tiny transformers (run where torch and diffusers are).

An Euler loop by hand, so that nothing but the hooks decides: for each case the string of computed steps, read off the calls of
a projection in a middle block, and the latents at the end. TaylorSeer's hooks sit on each attention; its string alone is kept.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, WanTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402

WAN = tiny.TRANSFORMER | {"num_layers": 4}
FLUX = dict(
    in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=18, num_attention_heads=2,
    joint_attention_dim=11, pooled_projection_dim=7, guidance_embeds=False, axes_dims_rope=(4, 6, 8),
)  # fmt: skip
STEPS = 14
SCALE = 3.0
RATIOS = [1.0, 1.2, 1.11, 1.04, 1.03, 0.99, 1.01, 0.97, 0.985, 0.96, 0.99, 1.02, 0.95, 0.97, 0.93, 0.96, 0.9, 0.86, 0.84]
CASES = {
    **{f"first_block/{t}": ("first_block", dict(threshold=t)) for t in (0.08, 0.2, 0.25, 0.31, 0.38, 0.45, 0.52, 0.6, 0.7)},
    **{
        f"magcache/{t}-{k}-{r}": ("magcache", dict(threshold=t, max_skip_steps=k, retention_ratio=r))
        for t, k, r in ((0.05, 2, 0.2), (0.11, 3, 0.2), (0.23, 5, 0.1), (0.5, 2, 0.35), (0.9, 9, 0.0))
    },
    **{
        f"taylorseer/{n}-{b}-{a}": (
            "taylorseer", dict(cache_interval=n, disable_cache_before_step=b, disable_cache_after_step=a)
        )
        for n, b, a in ((5, 3, None), (3, 1, 12), (4, 6, 11), (2, 2, 13))
    },
}  # fmt: skip


def config_of(kind: str, numbers: dict):
    """TaylorSeer's default patterns miss Wan's `attn1`, so the attentions are named."""
    if kind == "first_block":
        return FirstBlockCacheConfig(**numbers)
    if kind == "magcache":
        return MagCacheConfig(**numbers, num_inference_steps=STEPS, mag_ratios=RATIOS)
    attentions = [r"(blocks|(single_)?transformer_blocks)\.\d+\.attn[12]?"]
    return TaylorSeerCacheConfig(**numbers, taylor_factors_dtype=torch.float32, cache_identifiers=attentions)


def run(model, probe, branches, evaluate, latents, sigmas):
    """Euler from sigmas[0] to 0; returns the latents and a string of computed steps for each branch."""
    calls = []
    handle = probe.register_forward_hook(lambda *_: calls.append(1))
    strings = ["" for _ in branches]
    for index in range(STEPS):
        velocities = []
        for number, branch in enumerate(branches):
            before = len(calls)
            with torch.no_grad(), model.cache_context(str(number)):
                velocities.append(evaluate(latents, sigmas[index], branch))
            strings[number] += "F" if len(calls) > before else "."
        positive, negative = velocities[0], velocities[-1]
        velocity = negative + SCALE * (positive - negative) if len(branches) == 2 else positive
        latents = latents + (sigmas[index + 1] - sigmas[index]) * velocity
    handle.remove()
    return latents, strings


def wan():
    torch.manual_seed(0)
    model = WanTransformer3DModel(**WAN).eval()
    arrays = {"config": np.array(json.dumps(dict(model.config))), "keys": np.array(json.dumps(tiny.fill(model, "cache_wan")))}
    latents, text = torch.randn(1, 4, 3, 6, 4), torch.randn(2, 1, 5, WAN["text_dim"])

    def evaluate(latents, sigma, text):
        timestep = (1000 * sigma).reshape(1)
        return model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]

    return model, model.blocks[2].attn1.to_q, list(text), evaluate, latents, arrays | {"text": text.numpy()}


def flux():
    torch.manual_seed(1)
    model = FluxTransformer2DModel(**FLUX).eval()
    arrays = {"config": np.array(json.dumps(dict(model.config))), "keys": np.array(json.dumps(tiny.fill(model, "cache_flux1")))}
    latents, text, pooled = torch.randn(1, 4, 6, 10), torch.randn(1, 7, 11), torch.randn(1, 7)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)

    def evaluate(latents, sigma, _):
        velocity = model(
            hidden_states=FluxPipeline._pack_latents(latents, 1, 4, 6, 10), timestep=sigma.reshape(1),
            pooled_projections=pooled, encoder_hidden_states=text, txt_ids=torch.zeros(7, 3), img_ids=image_ids,
            return_dict=False,
        )[0]  # fmt: skip
        return FluxPipeline._unpack_latents(velocity, 48, 80, 8)

    arrays |= {"text": text[None].numpy(), "pooled": pooled[None].numpy()}
    return model, model.single_transformer_blocks[1].attn.to_q, [None], evaluate, latents, arrays


def main() -> None:
    for name, make in (("cache_wan", wan), ("cache_flux1", flux)):
        model, probe, branches, evaluate, latents, arrays = make()
        line = torch.linspace(1, 1 / STEPS, STEPS)
        sigmas = torch.cat([3 * line / (1 + 2 * line), torch.zeros(1)])
        arrays |= {"latents": latents.numpy(), "sigmas": sigmas.numpy(), "scale": np.float32(SCALE)}
        arrays["ratios"], strings = np.array(RATIOS), {}
        for case, (kind, numbers) in CASES.items():
            model.enable_cache(config_of(kind, numbers))
            out, strings[case] = run(model, probe, branches, evaluate, latents, sigmas)
            model.disable_cache()
            print(name, case, *strings[case])
            if kind != "taylorseer":
                arrays[f"{case}/out"] = out.numpy()
        arrays["strings"], arrays["cases"] = np.array(json.dumps(strings)), np.array(json.dumps(CASES))
        np.savez_compressed(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
