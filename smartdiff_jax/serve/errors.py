"""Every error of the service in OpenAI's envelope, and what becomes of each of ours."""

import logging
import math
from typing import Any, NoReturn

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from smartdiff_jax.engine.artifacts import StorageFailed
from smartdiff_jax.errors import InvalidField

log = logging.getLogger("smartdiff")

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """What every answer of 400 and above holds."""

    error: ErrorBody


class ServiceError(Exception):
    """An answer of 400 or above. retry_after: seconds, where trying again may help."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: float | None = None
    ):
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after
        super().__init__(message)


def envelope(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(error: ServiceError) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 409:
        headers["x-should-retry"] = "false"  # OpenAI's client tries again after a 409 otherwise
    return JSONResponse(envelope(error.status, error.message, error.param, error.code), error.status, headers)


def install(app: FastAPI) -> None:
    """Handlers for everything that can be raised."""

    async def ours(request: Request, error: Any) -> JSONResponse:
        return answer(error)

    async def invalid(request: Request, error: Any) -> JSONResponse:
        return answer(ServiceError(400, str(error), code="invalid_value", param=error.field))

    async def malformed(request: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
        param = ".".join(where) or None
        message = first["msg"].removeprefix("Value error, ")
        return answer(ServiceError(400, f"{param}: {message}" if param else message, code=first["type"], param=param))

    async def plain(request: Request, error: Any) -> JSONResponse:
        response = JSONResponse(envelope(error.status_code, str(error.detail)), error.status_code)
        response.headers.update(error.headers or {})
        if error.status_code == 405:
            response.headers["Allow"] = ", ".join(_allowed(request))
        return response

    async def away(request: Request, error: Any) -> JSONResponse:
        log.error("%s %s: %s", request.method, request.url.path, str(error).splitlines()[0])
        return answer(ServiceError(503, "the store of jobs cannot be reached", code="store_unavailable", retry_after=1.0))

    async def crashed(request: Request, error: Any) -> JSONResponse:
        log.exception("%s %s", request.method, request.url.path, exc_info=error)
        return answer(ServiceError(500, "the service failed; its log tells more", code="internal_error"))

    app.add_exception_handler(ServiceError, ours)
    app.add_exception_handler(InvalidField, invalid)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, plain)
    app.add_exception_handler(DBAPIError, away)
    app.add_exception_handler(StorageFailed, away)
    app.add_exception_handler(Exception, crashed)


def _allowed(request: Request) -> list[str]:
    """Of all routes at this path; the framework tells those of the first one alone."""
    scopes = [dict(request.scope) | {"method": method} for method in METHODS]
    routes = request.app.router.routes
    return [scope["method"] for scope in scopes if any(route.matches(scope)[0] is Match.FULL for route in routes)]


def not_found(what: str, name: str) -> NoReturn:
    raise ServiceError(404, f"no {what} {name!r}", code=f"{what}_not_found")
