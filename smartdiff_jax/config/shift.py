"""How far a model's schedule leans to high noise at each size: the shift s of sigma' = s * sigma / (1 + (s - 1) * sigma)."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict


class LinearShift(BaseModel):
    """mu grows linearly with the number of tokens; the shift is exp(mu), or mu itself where `time_shift_type` is linear.

    For FLUX.1 and Qwen-Image (arXiv 2403.03206, section 5.3.2). Fields as in diffusers' scheduler_config.json.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear"] = "linear"
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    def shift(self, num_tokens: int, num_steps: int) -> float:
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        mu = num_tokens * slope + self.base_shift - slope * self.base_image_seq_len
        return math.exp(mu) if self.time_shift_type == "exponential" else mu


class EmpiricalShift(BaseModel):
    """FLUX.2's fit: lines in the number of tokens for 10 and for 200 steps, and between them in the number of steps.

    From diffusers' pipeline_flux2.py (`compute_empirical_mu`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["empirical"] = "empirical"

    def shift(self, num_tokens: int, num_steps: int) -> float:
        at_200_steps = 0.00016927 * num_tokens + 0.45666666
        if num_tokens > 4300:
            return math.exp(at_200_steps)
        at_10_steps = 8.73809524e-05 * num_tokens + 1.89833333
        slope = (at_200_steps - at_10_steps) / 190.0
        return math.exp(slope * num_steps + at_200_steps - 200.0 * slope)


DynamicShift = LinearShift | EmpiricalShift
