"""/admin: what only keys with `admin: true` may ask, or everyone where there are no keys."""

import dataclasses
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from smartdiff_jax.config.service import ApiKey, Limits
from smartdiff_jax.errors import Conflict
from smartdiff_jax.serve.errors import ServiceError, not_found
from smartdiff_jax.serve.jobs import Caller, ServiceOf
from smartdiff_jax.serve.schemas import LimitsView, UpgradeView
from smartdiff_jax.serve.service import Service

router = APIRouter(prefix="/admin", tags=["admin"])


async def the_admin(caller: Caller) -> ApiKey:
    if not caller.admin:
        raise ServiceError(403, "this key is no admin's; use one with `admin: true` in the keys file", code="admin_only")
    return caller


Admin = Annotated[ApiKey, Depends(the_admin)]


def _view(service: Service, model: str, upgrade: Any) -> UpgradeView:
    return UpgradeView(weights=service.engine.pipelines[model].weights_id, **dataclasses.asdict(upgrade))


def _known(service: Service, model: str) -> None:
    if model not in service.engine.models:
        not_found("model", model)
    if model not in service.engine.pipelines:
        raise ServiceError(503, f"{model} is being loaded", code="not_ready", retry_after=2.0)


@router.get("/limits", response_model=LimitsView)
async def get_limits(service: ServiceOf, admin: Admin):
    """What is in force now; it changes with the files it was read from."""
    settings = service.settings
    limits = {name: getattr(settings.limits, name) for name in Limits.model_fields}
    keys = [key.name for key in settings.keys.values()]
    return LimitsView(**limits, keys=keys, refused=settings.refused, need_restart=settings.need_restart)


@router.post("/models/{model:path}", status_code=202, response_model=UpgradeView)
async def upgrade_model(model: str, service: ServiceOf, admin: Admin):
    """Load the model anew from where it was loaded at the start, try it, and let it take over; 409 while one is under way."""
    _known(service, model)
    if not service.alone:
        told = "this is one of several replicas; `smartdiff serve --ray` with the same file replaces all of them, one by one"
        raise ServiceError(409, told, code="one_of_several")
    try:
        return _view(service, model, service.engine.upgrades.begin(model))
    except Conflict as error:
        raise ServiceError(409, str(error), code="upgrade_under_way", retry_after=5.0) from None


@router.get("/models/{model:path}", response_model=UpgradeView)
async def get_upgrade(model: str, service: ServiceOf, admin: Admin):
    """How the newest upgrade of the model goes."""
    _known(service, model)
    return _view(service, model, service.engine.upgrades.of(model))
