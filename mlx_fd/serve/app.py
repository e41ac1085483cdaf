"""The ASGI application: who may ask, what was asked is noted, errors in OpenAI's form."""

from __future__ import annotations

import time
import traceback
import uuid
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_fd.serve.errors import ApiError
from mlx_fd.serve.exchange import CLIENT_GONE, ClientDisconnect, Reply
from mlx_fd.serve.limits import is_loopback, same_key
from mlx_fd.serve.routes import feedback, learning, state, texts, tutor
from mlx_fd.serve.service import Service

# A file of routes more is a line more here.
_ROUTES = (texts, feedback, tutor, learning, state)


def make_app(service: Service) -> ASGIApp:
    """The application of a server whose models are open."""
    return _Front(service, [route for part in _ROUTES for route in part.routes(service)])


class _Front:
    """What every request goes through."""

    def __init__(self, service: Service, routes: list[Route]):
        self._service = service
        # Not Starlette's application: it would answer errors in its own form.
        self._inner = Router(routes, redirect_slashes=False)
        # Paths that clients make up would be metrics without end.
        self._paths = frozenset(route.path for route in routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            return
        note: dict[str, Any] = {"status": None, "error": None, "fields": {}, "texts": {}}
        scope["mlx_fd"] = note
        scope["app"] = self  # then a wrong path or method is an HTTPException
        number, begin = uuid.uuid4().hex, time.monotonic()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                note["status"] = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        error = await self._handle(scope, receive, sending)
        status = str(note["status"] or 500)
        path = scope["path"] if scope["path"] in self._paths else "other"
        seconds = time.monotonic() - begin
        self._service.metrics.requests.labels(path, status).inc()
        self._service.metrics.seconds.labels(path).observe(seconds)
        self._service.log.write(
            "request",
            note["texts"],
            id=number,
            method=scope["method"][:16],
            path=path,
            status=int(status),
            seconds=round(seconds, 4),
            error=error,
            **note["fields"],
        )

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> str | None:
        """Answer a request; what is noted of an error."""
        note, reply = scope["mlx_fd"], Reply(send)
        try:
            self._check(scope)
            await self._inner(scope, receive, send)
        except ApiError as error:
            await reply.error(error)
            return error.code
        except HTTPException as wrong:
            answered = _wrong_route(scope, wrong)
            await reply.error(answered)
            return answered.code
        except ClientDisconnect:
            note["status"] = CLIENT_GONE
        except Exception as error:
            if note["status"] is None:
                answered = ApiError(500, "Something went wrong in the server.", code="internal")
                await reply.error(answered)
            return "".join(traceback.format_exception(error))[-4000:]
        found: str | None = note["error"]
        return found

    def _check(self, scope: Scope) -> None:
        """Refuse who may not ask.

        Raises:
            ApiError: no key or a wrong one, or a name of this machine that is none.
        """
        headers, key = Headers(scope=scope), self._service.options.key
        if key is None:
            # A web page that got a name to mean this machine must not read from it.
            if not is_loopback(_host_name(headers.get("host", ""))):
                raise ApiError(
                    403,
                    "Without an API key the server answers on this machine only, as localhost.",
                    code="wrong_host",
                )
            return
        if scope["path"] == state.HEALTH or scope["path"] in tutor.PAGES:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not same_key(given.strip(), key):
            raise ApiError(
                401,
                "Incorrect API key provided. Send it as: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _host_name(header: str) -> str:
    """The name in a Host header, without the port; empty where there is none."""
    try:
        return urlsplit("//" + header).hostname or ""
    except ValueError:
        return ""


def _wrong_route(scope: Scope, error: HTTPException) -> ApiError:
    path, method = scope["path"], scope["method"]
    headers = dict(error.headers or {})
    if error.status_code == 405:
        message = f"{path:.128} does not take {method:.16}."
        return ApiError(405, message, code="method_not_allowed", headers=headers)
    message = f"There is nothing at {path:.128}."
    return ApiError(error.status_code, message, code="not_found", headers=headers)
