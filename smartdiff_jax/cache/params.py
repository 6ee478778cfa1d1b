"""From the `cache_params` of a request to checked numbers."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from smartdiff_jax.config.fields import raise_invalid
from smartdiff_jax.errors import InvalidConfig, InvalidField, InvalidRequest

MAX_STEPS = 200
"""Tables are padded to it, as the samplers' are."""

LAST_TIMESTEP = 1000.0
"""Of noise alone, as models are told it; a noise level of 1."""

Checked = TypeVar("Checked", bound=BaseModel)


class CacheParams(BaseModel):
    """What all policies' parameters have in common: none is unknown, and none is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelNumbers(CacheParams):
    """What is known of a model for one policy.

    source: where the numbers are from. params: the policy's parameters for this model, where a user gives none.
    """

    source: str = ""
    params: dict[str, Any] = {}


def check_params(kind: type[Checked], params: Mapping[str, Any]) -> Checked:
    """A user's parameters, or one InvalidRequest that names each wrong one as `cache_params.<field>`."""
    return _checked(kind, params, "cache_params", InvalidRequest)


def check_numbers(kind: type[Checked], model_numbers: Mapping[str, Any], policy: str) -> Checked:
    """What is known of a model for one policy (`cache.published`, or a calibration), or one InvalidConfig."""
    return _checked(kind, model_numbers.get(policy, {}), policy, InvalidConfig)


def _checked(kind: type[Checked], values: Mapping[str, Any], name: str, error: type[InvalidField]) -> Checked:
    try:
        return getattr(_request(kind, name)(**{name: dict(values)}), name)
    except ValidationError as wrong:
        raise_invalid(wrong, error, kind)


@lru_cache(maxsize=64)
def _request(kind: type[BaseModel], name: str) -> Any:
    """A model whose one field is of that kind, so that errors name both; half a millisecond to make."""
    return create_model("Request", **{name: (kind, ...)})  # type: ignore[call-overload]
