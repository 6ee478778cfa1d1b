"""The autoencoder of Qwen-Image: Wan's network, trained further on pictures (arXiv 2508.02324, section 2.3).

Follows `diffusers.AutoencoderKLQwenImage`, whose keys are those of AutoencoderKLWan. A picture is a clip of one frame.
"""

from typing import Any

from pydantic import model_validator

from smartdiff_jax.models.family import Architecture
from smartdiff_jax.models.vae.wan_vae import KEY_RULES, WanVAE, WanVAEConfig


class QwenImageVAEConfig(WanVAEConfig):
    """config.json of diffusers' AutoencoderKLQwenImage: Wan's fields, but `input_channels` is the channels of a picture."""

    input_channels: int = 3

    @model_validator(mode="before")
    @classmethod
    def _channels(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        channels = fields.get("input_channels", 3)
        return {**fields, "in_channels": channels, "out_channels": channels}

    @property
    def temporal_stride(self) -> int:
        """0: there is one frame, although the network could make several of a longer latent."""
        return 0


ARCHITECTURE = Architecture(config=QwenImageVAEConfig, build=WanVAE, key_rules=KEY_RULES)
