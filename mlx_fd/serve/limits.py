"""What one client, and all of them, may take: bytes, tokens, seconds, places."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass

from mlx_fd.errors import UserError
from mlx_fd.serve.errors import ApiError, bad

# A key that can be guessed is none.
SHORTEST_KEY = 16
_LONGEST_WAIT = 60


@dataclass(frozen=True)
class Limits:
    """What requests may take.

    Attributes:
        body_bytes: of a request's body.
        body_seconds: until headers, and then the body, have come.
        prompt_tokens: that one conversation may have before the reply.
        max_tokens: that one reply may ask for.
        seconds: of one request, waiting included.
        places: texts that each model writes side by side.
        queue: requests that may wait beyond those.
        connections: open at a time.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    prompt_tokens: int = 4096
    max_tokens: int = 1024
    seconds: float = 300.0
    places: int = 16
    queue: int = 64
    connections: int = 1024

    @property
    def most(self) -> int:
        """Requests that run or wait at a time."""
        return self.places + self.queue


class Admission:
    """Who may come in: so many at a time, nobody while the server goes down.

    While it is paused (for new weights), those who come wait, and those who are in finish.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._open = asyncio.Event()
        self._open.set()
        self._calm = asyncio.Event()
        self._alone = asyncio.Lock()
        self._mean = 1.0
        self.inside = 0
        self.running = 0
        self.draining = False

    @contextlib.asynccontextmanager
    async def enter(self, weight: int = 1) -> AsyncIterator[None]:
        """A place for a request, or for as many texts as it asks for.

        Raises:
            ApiError: 429 where too many are in already, 503 while the server goes down.
        """
        if self.draining:
            raise ApiError(
                503,
                "The server is shutting down; send the request again later.",
                code="shutting_down",
                headers={"retry-after": "5", "connection": "close"},
            )
        most = self._limits.most
        if weight > most:
            raise bad(f"A request may have at most {most} items, not {weight}.", "items")
        if self.inside + weight > most:
            raise ApiError(
                429,
                f"The server is busy: {self.inside} requests run or wait already. Send the request "
                "again after the seconds in Retry-After.",
                code="server_busy",
                headers={"retry-after": str(self._wait())},
            )
        self.inside += weight
        loop = asyncio.get_running_loop()
        begin = loop.time()
        try:
            while not self._open.is_set():
                await self._open.wait()
            self.running += weight
            try:
                yield
            finally:
                self.running -= weight
                self._calm.set()
        finally:
            self.inside -= weight
            # A moving mean of what a request takes, for those who are sent away.
            self._mean += 0.1 * (loop.time() - begin - self._mean)

    def _wait(self) -> int:
        """Seconds until a place may be free."""
        rounds = max(1.0, self.inside / self._limits.places)
        return min(_LONGEST_WAIT, max(1, math.ceil(self._mean * rounds / 2)))

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """The models to oneself: who is in finishes first, who comes waits."""
        async with self._alone:
            self._open.clear()
            try:
                await self.empty()
                yield
            finally:
                self._open.set()

    async def empty(self) -> None:
        """Wait until no request runs."""
        while self.running:
            self._calm.clear()
            await self._calm.wait()


def check_key(key: str | None, host: str) -> None:
    """Make sure that only this machine gets in without a key.

    Raises:
        UserError: another host without a key, or a key that can be guessed.
    """
    if key is None and not is_loopback(host):
        raise UserError(
            f"--host {host}: other machines could use the models; set an API key "
            "(--api-key-file FILE, or the variable MLX_FD_API_KEY), or leave --host out"
        )
    if key is not None and (len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable()):
        raise UserError(
            f"the API key must have at least {SHORTEST_KEY} printable ASCII characters; make one "
            "with: openssl rand -hex 24"
        )


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own, which no other machine reaches."""
    name = host.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def same_key(given: str, key: str) -> bool:
    """Whether a key is the right one, in a time that does not tell how much of it is right."""
    digests = (hashlib.sha256(text.encode()).digest() for text in (given, key))
    return hmac.compare_digest(*digests)
