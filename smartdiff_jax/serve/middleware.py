"""Around every request: its id, and how long its body may be. Plain ASGI, so that streams stream."""

import re
import secrets

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smartdiff_jax.serve.errors import ServiceError, answer

MAX_BODY = 1 << 20
TOO_LONG = f"a request's body may have {MAX_BODY:,} bytes"
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestId:
    """Echoes `x-request-id`, or gives one."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}".encode()

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        await self.app(scope, receive, with_id)


class BodyLimit:
    """Answers 413 where a body is longer than MAX_BODY, whatever its header says."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY:
            return await answer(ServiceError(413, TOO_LONG, code="body_too_large"))(scope, receive, send)
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, TOO_LONG)  # the one exception that FastAPI lets through while it reads a body
            return message

        await self.app(scope, counted, send)
