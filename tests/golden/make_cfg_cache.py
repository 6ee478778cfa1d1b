"""Makes cache_cfg.npz with diffusers' FasterCache hook on the tiny Wan of cache_wan.npz (run where torch and diffusers are).

An Euler loop by hand over both branches as one batch, as the hook wants it, negative first. Its hooks on attention never skip.
Both frequency bands have one weight; where that is not 1, no two skips are in a row, because the hook multiplies what it stores
at every skip.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers.hooks import FasterCacheConfig
from make_block_caches import SCALE, STEPS, wan

CASES = {
    f"{interval}-{below}-{gain}": dict(interval=interval, below=below, gain=gain)
    for interval, below, gain in ((5, 641, 1.0), (5, 1001, 1.0), (3, 801, 1.0), (2, 1001, 1.1), (2, 901, 0.8), (1, 1001, 1.0))
}


def run(model, probe, latents, text, sigmas, interval, below, gain):
    now, calls = [0.0], []
    everywhere, nowhere = (-1, 2000), (-2, -1)
    model.enable_cache(
        FasterCacheConfig(
            unconditional_batch_skip_range=interval,
            unconditional_batch_timestep_skip_range=(-1, below),
            low_frequency_weight_update_timestep_range=everywhere,
            high_frequency_weight_update_timestep_range=everywhere,
            alpha_low_frequency=gain,
            alpha_high_frequency=gain,
            spatial_attention_timestep_skip_range=nowhere,
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BCFHW",
            current_timestep_callback=lambda: now[0],
        )
    )
    handle = probe.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape[0]))
    for index in range(STEPS):
        timestep = 1000 * sigmas[index]
        now[0] = float(timestep)
        with torch.no_grad():
            negative, positive = model(
                hidden_states=torch.cat([latents, latents]),
                timestep=timestep.repeat(2),
                encoder_hidden_states=torch.cat([text[1], text[0]]),
                return_dict=False,
            )[0].chunk(2)
        latents = latents + (sigmas[index + 1] - sigmas[index]) * (negative + SCALE * (positive - negative))
    handle.remove()
    model.disable_cache()
    return latents, "".join("F" if size == 2 else "." for size in calls)


def main() -> None:
    known = np.load(Path(__file__).parent / "cache_wan.npz")
    latents, text, sigmas = (torch.from_numpy(known[name]) for name in ("latents", "text", "sigmas"))
    model, probe, *_ = wan()
    arrays, strings = {}, {}
    for case, numbers in CASES.items():
        out, strings[case] = run(model, probe, latents, text, sigmas, **numbers)
        print(case, strings[case])
        arrays[f"{case}/out"] = out.numpy()
    arrays["strings"], arrays["cases"] = np.array(json.dumps(strings)), np.array(json.dumps(CASES))
    np.savez_compressed(Path(__file__).parent / "cache_cfg.npz", **arrays)


if __name__ == "__main__":
    main()
