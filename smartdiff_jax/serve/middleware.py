"""Around every request: its id, and how long its body may be. Plain ASGI, so that streams stream."""

import re
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smartdiff_jax.serve.errors import ServiceError, answer

MAX_BODY = 1 << 20
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
        started = False
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise _TooLong
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            length = dict(scope["headers"]).get(b"content-length", b"0")
            if length.isdigit() and int(length) > MAX_BODY:
                raise _TooLong
            await self.app(scope, counted, watched)
        except _TooLong:
            if not started:
                error = ServiceError(413, f"a request's body may have {MAX_BODY:,} bytes", code="body_too_large")
                await answer(error)(scope, receive, send)


class _TooLong(Exception):
    pass
