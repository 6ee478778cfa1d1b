"""Before a job is read: one that comes while the service starts waits until jobs are taken, and a full queue is told before all
else: no body is read, no model resolved, nothing asked of the store.

Under a burst nearly all requests end here, and those that do not, and all status calls, share one event loop with them.
"""

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from smartdiff_jax.engine.admission import refuse_if_full
from smartdiff_jax.engine.store import QueueFull
from smartdiff_jax.serve.errors import ServiceError, answer
from smartdiff_jax.serve.service import Service

PATHS = ("/v1/jobs", "/v1/images/generations", "/v1/videos")
"""Where a POST makes a job."""


class EarlyRefusal:
    """Answers 429 where the queue is full; all else goes on, and the store has the last word."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in PATHS:
            await self._service.arrival()
            if (refused := await self._refused(Request(scope))) is not None:
                return await answer(refused)(scope, receive, send)
        await self.app(scope, receive, send)

    async def _refused(self, request: Request) -> ServiceError | None:
        service = self._service
        try:
            engine, caller = service.engine, service.caller(request)
        except ServiceError:  # it has failed to start, or no valid key: the route says so
            return None
        try:
            refuse_if_full(engine, caller)
        except QueueFull as error:
            name = request.headers.get("idempotency-key")
            if name is not None and await service.read(engine.store.knows, caller.name, name):
                return None  # the job it made is told, however full the queue is
            return service.full(error)
        return None
