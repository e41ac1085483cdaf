"""One HTTP exchange that ends: in so many seconds, after so many bytes, whatever the server does.

A timeout of a socket begins anew with every byte. Here the time and the bytes that are left are
looked at before and after each read of the connection, so that "100 Continue" without end, headers
or a body in drops, and streams that never stop all count against the same limits.
"""

from __future__ import annotations

import functools
import http.client
import io
import socket
import time
import urllib.request
from typing import IO, Any

from mlx_fd.errors import UserError

_CONNECT_SECONDS = 30.0  # for each of a host's addresses, where the exchange has more


class Unusable(UserError):
    """The server answered, and what it said cannot be used: another request may do better."""


class Budget:
    """What an exchange may still take.

    Args:
        where: the address, for messages.
        seconds: for all of it, from now, tries and waits between them included.
        size: bytes from the server, headers included.
    """

    def __init__(self, where: str, seconds: float, size: int):
        self._where, self._size, self._room = where, size, size
        self.seconds, self._end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, above 0.

        Raises:
            TimeoutError: there are none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"not done within {self.seconds:g} seconds")
        return left

    def take(self, count: int) -> None:
        """Count bytes that came.

        Raises:
            Unusable: they are too many.
        """
        self._room -= count
        if self._room < 0:
            raise Unusable(f"{self._where}: the response is above {self._size / 2**20:g} MiB")


class _Reader(io.RawIOBase):
    """What comes from a socket, within the budget."""

    def __init__(self, source: socket.socket, budget: Budget):
        self._socket, self._budget = source, budget
        # Keeps the socket open for as long as a response is read, as a socket's own files do.
        self._file = source.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(self._budget.left())
        count = self._file.readinto(buffer)
        self._budget.take(count or 0)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, budget: Budget, **kwargs: Any):
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_Reader(sock, budget))


class _Connection(http.client.HTTPConnection):
    def __init__(self, *args: Any, budget: Budget, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._budget = budget
        self.response_class = functools.partial(_Response, budget=budget)  # type: ignore[assignment]

    def connect(self) -> None:
        self.timeout = min(self._budget.left(), _CONNECT_SECONDS)
        super().connect()

    def send(self, data: Any) -> None:
        if self.sock is not None:
            self.sock.settimeout(self._budget.left())
        super().send(data)


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def __init__(self, budget: Budget):
        super().__init__()
        self._budget = budget

    def http_open(self, req: urllib.request.Request) -> Any:
        kind: Any = functools.partial(_Connection, budget=self._budget)
        return self.do_open(kind, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, budget: Budget):
        super().__init__()
        self._budget = budget

    def https_open(self, req: urllib.request.Request) -> Any:
        kind: Any = functools.partial(_SecureConnection, budget=self._budget)
        return self.do_open(kind, req)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """What is sent to one server is for that server: a redirect is an error."""

    def http_error_302(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
    ) -> None:
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def open_url(request: urllib.request.Request, budget: Budget, *, through_proxy: bool = True) -> Any:
    """The response to a request, its body still to be read.

    Args:
        request: as ``urllib`` takes it.
        budget: of the exchange.
        through_proxy: whether the proxy that the environment names is used.

    Raises:
        urllib.error.HTTPError: its status is no success; a redirect is none.
        urllib.error.URLError, http.client.HTTPException, OSError: the connection fails; of time
            that is up, a ``TimeoutError`` (the ``reason`` of a ``URLError``).
        Unusable: there is too much of it; likewise where the body is read.
    """
    handlers: list[Any] = [_NoRedirects, _Http(budget), _Https(budget)]
    if not through_proxy:
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers).open(request, timeout=budget.left())
