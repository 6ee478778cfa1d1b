"""Makes image_schedules.npz: sigmas and timesteps as the image pipelines set them (run where torch and diffusers are)."""

from pathlib import Path

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

HERE = Path(__file__).parent
STEPS = (1, 2, 4, 9, 20, 50)
TOKENS = (96, 256, 1024, 4096, 4300, 6889, 9216)
SCHEDULERS = {
    "flux": dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096),
    "qwen": dict(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
        shift_terminal=0.02,
    ),
    "klein": dict(use_dynamic_shifting=True),
    "fixed": dict(shift=6.0),
}  # fmt: skip


def main() -> None:
    arrays = {}
    for name, settings in SCHEDULERS.items():
        for steps in STEPS:
            for tokens in TOKENS:
                scheduler = FlowMatchEulerDiscreteScheduler(**settings)
                if name == "klein":
                    mu = compute_empirical_mu(tokens, steps)
                else:
                    config = scheduler.config
                    mu = calculate_shift(
                        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
                    )
                if settings.get("shift_terminal") and steps == 1:
                    continue  # upstream divides by zero
                scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
                arrays[f"{name}/{steps}/{tokens}/sigmas"] = scheduler.sigmas.numpy()
                arrays[f"{name}/{steps}/{tokens}/timesteps"] = scheduler.timesteps.numpy()
    np.savez_compressed(HERE / "image_schedules.npz", **arrays)


if __name__ == "__main__":
    main()
