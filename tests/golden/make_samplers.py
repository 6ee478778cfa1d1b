"""Goldens for tests/samplers: trajectories of diffusers' three flow schedulers on a synthetic velocity field.

Run in an environment with torch and diffusers: python tests/golden/make_samplers.py

samplers.npz holds, for each sampler, `<name>/timesteps` [k], `<name>/sigmas` [k], `<name>/latents` [k, 1, 2, 2, 3]: one
row a step, `latents` being what the step returns; the runs follow one another, shift by shift, in each shift by step
count, as in SHIFTS and STEP_COUNTS. `start` is where every run begins, `matrix` and `phase` make the velocity.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

SHIFTS = (1.0, 3.0, 5.0, 8.0, 12.0)
STEP_COUNTS = (1, 2, 3, 5, 20, 50)
SHAPE = (1, 2, 2, 3)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2}

MAKERS = {
    "flow_euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    "flow_unipc": lambda shift: UniPCMultistepScheduler(solver_type="bh2", flow_shift=shift, **FLOW),
    "flow_dpmpp": lambda shift: DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_type="midpoint", flow_shift=shift, **FLOW
    ),
}


def main() -> None:
    rng = np.random.default_rng(0)
    size = int(np.prod(SHAPE))
    start = rng.standard_normal(SHAPE).astype(np.float32)
    matrix = (0.5 * rng.standard_normal((size, size)) / np.sqrt(size) + 0.5 * np.eye(size)).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, size).astype(np.float32)
    torch_matrix, torch_phase = torch.from_numpy(matrix), torch.from_numpy(phase)

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (torch_matrix @ latents.reshape(-1) + torch.sin(3 * sigma + torch_phase)).reshape(latents.shape)

    arrays = {"start": start, "matrix": matrix, "phase": phase}
    for name, make in MAKERS.items():
        rows: dict[str, list[np.ndarray]] = {"timesteps": [], "sigmas": [], "latents": []}
        for shift in SHIFTS:
            for num_steps in STEP_COUNTS:
                scheduler = make(shift)
                scheduler.set_timesteps(num_steps)
                scheduler.set_begin_index(0)
                latents = torch.from_numpy(start)
                for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
                    step = scheduler.step(velocity(latents, sigma), timestep, latents, return_dict=False)
                    latents = step[0]
                    rows["timesteps"].append(timestep.numpy().astype(np.float32))
                    rows["sigmas"].append(sigma.numpy())
                    rows["latents"].append(latents.numpy())
        arrays |= {f"{name}/{key}": np.stack(value) for key, value in rows.items()}
    np.savez_compressed(Path(__file__).with_name("samplers.npz"), **arrays)


if __name__ == "__main__":
    main()
