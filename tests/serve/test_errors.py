"""What an exception becomes on its way out."""

import asyncio

import httpx2
import pytest
from fastapi import FastAPI
from sqlalchemy.exc import OperationalError

from smartdiff_jax.engine.artifacts import StorageFailed
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.serve.errors import ServiceError, install
from smartdiff_jax.serve.middleware import RequestId


@pytest.mark.parametrize(
    "error, status, code, retry_after",
    [
        (OperationalError("SELECT secret", {}, Exception("database is locked")), 503, "store_unavailable", "1"),
        (StorageFailed("a.png cannot be read: timed out"), 503, "store_unavailable", "1"),
        (InvalidRequest("size", "1x1", "too small"), 400, "invalid_value", None),
        (ServiceError(429, "full", code="queue_full", retry_after=2.2), 429, "queue_full", "3"),
        (KeyError("secret"), 500, "internal_error", None),
    ],
)
def test_exceptions_become_envelopes(error, status, code, retry_after):
    app = FastAPI()
    install(app)
    app.add_middleware(RequestId)

    @app.get("/")
    async def fail():
        raise error

    async def call():
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://a") as http:
            return await http.get("/", headers={"x-request-id": "mine"})

    response = asyncio.run(call())
    body = response.json()["error"]
    assert (response.status_code, body["code"], response.headers.get("retry-after")) == (status, code, retry_after)
    assert set(body) == {"message", "type", "param", "code"} and "secret" not in response.text
