"""Makes cache_pab.npz with diffusers' PyramidAttentionBroadcast on the tiny transformers of make_block_caches.py.

Its hooks know no branches of guidance, so both run as one batch. For each case the steps at which self- and cross-attention
were computed, read off the calls of their query projections in a middle block, and the latents at the end.
"""

import json
from pathlib import Path

import make_block_caches as blocks
import numpy as np
import torch
from diffusers import PyramidAttentionBroadcastConfig

CASES = {
    "cache_wan": [
        dict(self_interval=n, cross_interval=m, min_timestep=low, max_timestep=high)
        for n, m, low, high in ((2, 3, 100, 800), (3, 2, 0, 1000), (1, 5, 350, 950), (4, 1, 100, 920), (5, 6, 400, 1000))
    ],
    "cache_flux1": [
        dict(self_interval=n, min_timestep=low, max_timestep=high)
        for n, low, high in ((2, 100, 800), (3, 0, 1000), (5, 350, 950))
    ],
}


def run(model, probes, evaluate, latents, sigmas, numbers):
    """Euler from sigmas[0] to 0; returns the latents and for each probe a string of computed steps."""
    now = [0.0]
    kinds = {
        "spatial": numbers["self_interval"],
        **({"cross": numbers["cross_interval"]} if "cross_interval" in numbers else {}),
    }
    timesteps = numbers["min_timestep"], numbers["max_timestep"]
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            **{f"{kind}_attention_block_skip_range": interval for kind, interval in kinds.items()},
            **{f"{kind}_attention_timestep_skip_range": timesteps for kind in kinds},
            current_timestep_callback=lambda: now[0],
        )
    )
    calls = [[] for _ in probes]
    handles = [p.register_forward_hook(lambda *_, own=own: own.append(1)) for p, own in zip(probes, calls, strict=True)]
    strings = ["" for _ in probes]
    for index in range(blocks.STEPS):
        before = [len(own) for own in calls]
        now[0] = 1000 * float(sigmas[index])
        with torch.no_grad():
            velocity = evaluate(latents, sigmas[index])
        strings = [
            string + ("F" if len(own) > count else ".") for string, own, count in zip(strings, calls, before, strict=True)
        ]
        latents = latents + (sigmas[index + 1] - sigmas[index]) * velocity
    for handle in handles:
        handle.remove()
    model.disable_cache()
    return latents, strings


def main() -> None:
    arrays = {"cases": np.array(json.dumps(CASES))}
    line = torch.linspace(1, 1 / blocks.STEPS, blocks.STEPS)
    sigmas = torch.cat([3 * line / (1 + 2 * line), torch.zeros(1)])
    strings = {}
    for name, make in (("cache_wan", blocks.wan), ("cache_flux1", blocks.flux)):
        model, _, branches, _, latents, _ = found = make()
        one = found[3]

        def guided(latents, sigma, model=model, branches=branches):
            velocity = model(
                hidden_states=latents.repeat(2, 1, 1, 1, 1), timestep=(1000 * sigma).repeat(2),
                encoder_hidden_states=torch.cat(branches), return_dict=False,
            )[0]  # fmt: skip
            return velocity[1:] + blocks.SCALE * (velocity[:1] - velocity[1:])

        if name == "cache_wan":
            evaluate, probes = guided, (model.blocks[2].attn1.to_q, model.blocks[2].attn2.to_q)
        else:
            evaluate = lambda latents, sigma, one=one: one(latents, sigma, None)  # noqa: E731
            probes = (model.transformer_blocks[1].attn.to_q, model.single_transformer_blocks[1].attn.to_q)
        for number, numbers in enumerate(CASES[name]):
            out, strings[f"{name}/{number}"] = run(model, probes, evaluate, latents, sigmas, numbers)
            arrays[f"{name}/{number}/out"] = out.numpy()
            print(name, numbers, *strings[f"{name}/{number}"])
    np.savez_compressed(Path(__file__).parent / "cache_pab.npz", strings=np.array(json.dumps(strings)), **arrays)


if __name__ == "__main__":
    main()
