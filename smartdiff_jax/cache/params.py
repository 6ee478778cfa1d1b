"""From the `cache_params` of a request to checked numbers."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from smartdiff_jax.config.fields import raise_invalid
from smartdiff_jax.errors import InvalidRequest

MAX_STEPS = 200
"""Tables are padded to it, as the samplers' are."""

Checked = TypeVar("Checked", bound=BaseModel)


class CacheParams(BaseModel):
    """What all policies' parameters have in common: none is unknown, and none is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def check_params(kind: type[Checked], params: Mapping[str, Any]) -> Checked:
    """The parameters, or one InvalidRequest that names each wrong one as `cache_params.<field>`."""
    request = create_model("Request", cache_params=(kind, ...))
    try:
        return request(cache_params=dict(params)).cache_params  # type: ignore[attr-defined]
    except ValidationError as error:
        raise_invalid(error, InvalidRequest, kind)
