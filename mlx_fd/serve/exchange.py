"""A request from its body to the end of its reply, while its client stays."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from mlx_fd.serve.errors import ApiError
from mlx_fd.serve.limits import Limits
from mlx_fd.serve.schema import parse_json

CLIENT_GONE = 499
_CLOSE = {"connection": "close"}


class Reply:
    """What is sent to a client; an error can still be told where nothing was sent yet."""

    def __init__(self, send: Send):
        self._send = send
        self.begun = False

    async def json(
        self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a whole reply."""
        # ASCII: whatever a text holds, it can be sent.
        body = json.dumps(content).encode()
        await self.whole(body, "application/json", status, headers)

    async def whole(
        self,
        body: bytes,
        media_type: str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send a whole reply of any kind."""
        found = {"content-length": str(len(body)), **(headers or {})}
        await self._start(media_type, status, found)
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, headers: Mapping[str, str]) -> None:
        """Begin a stream of server-sent events."""
        await self._start("text/event-stream", 200, {"cache-control": "no-cache", **headers})

    async def event(self, data: str) -> None:
        """Send an event; waits while the client does not read."""
        body = f"data: {data}\n\n".encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        """End a stream."""
        await self._send({"type": "http.response.body", "body": b""})

    async def error(self, error: ApiError) -> None:
        """Tell an error: as the reply, or as the last event of one that has begun."""
        if not self.begun:
            await self.json(error.content(), error.status, error.headers)
            return
        await self.event(json.dumps(error.content()))
        await self.end()

    async def _start(self, media_type: str, status: int, headers: Mapping[str, str]) -> None:
        self.begun = True
        raw = {"content-type": media_type, "x-content-type-options": "nosniff", **headers}
        lines = [(name.encode(), value.encode("latin-1", "replace")) for name, value in raw.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": lines})


class Exchange:
    """An ASGI reply that is worked for until it is sent, the client leaves, or time is up."""

    def __init__(self, work: Callable[[Reply], Awaitable[None]], seconds: float):
        """A reply.

        Args:
            work: sends it; cancelled where nobody waits for it any more.
            seconds: that it may take.
        """
        self._work, self._seconds = work, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Work for it."""
        reply, note = Reply(send), scope["mlx_fd"]
        working = asyncio.ensure_future(self._within(reply, note))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                await working
            else:
                note["status"] = CLIENT_GONE
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _within(self, reply: Reply, note: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._work(reply)
        except ApiError as error:
            await _refuse(reply, note, error)
        except TimeoutError:
            late = ApiError(
                504,
                f"The reply took more than the {self._seconds:g} seconds that a request may take "
                "here.",
                code="timeout",
            )
            # A client that reads nothing cannot be told, and is not waited for without end.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await _refuse(reply, note, late)
        except Exception:
            # What it was stands in the log, not in the reply.
            wrong = ApiError(500, "Something went wrong in the server.", code="internal")
            await _refuse(reply, note, wrong)
            raise


async def _refuse(reply: Reply, note: dict[str, Any], error: ApiError) -> None:
    """Tell an error, and note it: a stream that breaks off has begun with status 200."""
    note["status"], note["error"] = error.status, error.code
    await reply.error(error)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def read_json(request: Request, limits: Limits) -> Any:
    """A request's body.

    Raises:
        ApiError: it is no JSON, too large, or comes too slowly.
        ClientDisconnect: the client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A web page can send other types to this machine without asking the browser first.
        raise ApiError(
            415, "The body must have the Content-Type application/json.", code="unsupported_type"
        )
    too_large = ApiError(
        413,
        f"The body is larger than the {limits.body_bytes} bytes that are allowed here.",
        code="body_too_large",
        headers=_CLOSE,
    )
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408,
            f"The body did not come within {limits.body_seconds:g} seconds.",
            code="body_too_slow",
            headers=_CLOSE,
        ) from None
    return parse_json(bytes(body))


__all__ = ["CLIENT_GONE", "ClientDisconnect", "Exchange", "Reply", "read_json"]
