"""The families that can be trained, one file each."""

from smartdiff_jax.registry import Registry
from smartdiff_jax.training.trainees.base import Trainee
from smartdiff_jax.training.trainees.qwen_image import QWEN_IMAGE
from smartdiff_jax.training.trainees.wan import WAN

TRAINEES: Registry[Trainee] = Registry("trained family", {"wan": WAN, "qwen-image": QWEN_IMAGE})
