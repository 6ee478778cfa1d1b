"""Three tiers of parameters: model (fixed with the weights), user (one request), system (one process)."""

from smartdiff_jax.config.model import ModelSpec as ModelSpec
from smartdiff_jax.config.model import known_models as known_models
from smartdiff_jax.config.request import GenerateParams as GenerateParams
from smartdiff_jax.config.request import ResolvedParams as ResolvedParams
from smartdiff_jax.config.system import MeshConfig as MeshConfig
from smartdiff_jax.config.system import SystemConfig as SystemConfig
