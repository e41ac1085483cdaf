"""The server from its start to its end: signals, slow clients, the listening socket."""

from __future__ import annotations

import asyncio
import functools
import signal
import socket
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_fd.errors import UserError
from mlx_fd.evaluation.cascade.confidence import confidence
from mlx_fd.evaluation.cascade.file import read, why_other
from mlx_fd.serve.app import make_app
from mlx_fd.serve.engine import Engine
from mlx_fd.serve.limits import Admission
from mlx_fd.serve.logs import Log
from mlx_fd.serve.metrics import Metrics
from mlx_fd.serve.models import Served, open_served
from mlx_fd.serve.rule import Rule
from mlx_fd.serve.service import Options, Service

_MOST_HEADERS = 32 << 10
_KEEP_ALIVE = 30


def serve(options: Options, on_ready: Callable[[Service, str], None]) -> None:
    """Serve until a signal ends it.

    The first SIGTERM or Ctrl-C lets requests finish and refuses new ones; the second ends at once.

    Args:
        options: what to serve, and where.
        on_ready: called with the service and its address once it answers.

    Raises:
        UserError: models cannot be opened, or the address cannot be had.
    """
    asyncio.run(_serve(options, on_ready))


async def _serve(options: Options, on_ready: Callable[[Service, str], None]) -> None:
    listening = _listen(options.host, options.port)
    engine = Engine(options.limits.places)
    try:
        served = await engine.start(functools.partial(open_served, options.student, options.expert))
        service = Service(
            options=options,
            engine=engine,
            served=served,
            rule=rule_of(options, served),
            metrics=Metrics(),
            log=Log(texts=options.log_texts),
            admission=Admission(options.limits),
        )
        server = _Server(service)
        running = asyncio.ensure_future(server.serve(sockets=[listening]))
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        on_ready(service, _address(listening))
        await running
        service.close()
    finally:
        listening.close()
        await engine.stop()


def rule_of(options: Options, served: Served) -> Rule:
    """When the expert is asked: as the options say, else as the run was calibrated.

    Raises:
        UserError: the run's calibration is damaged.
    """
    ref, calibrated = served.judge.ref, None
    if served.scores and ref.run is not None:
        calibrated = read(ref.run)
    if calibrated is None:
        threshold = 0.0 if options.threshold is None else options.threshold
        plain = "above 0 it says that an answer is right; not calibrated"
        return Rule(threshold, None, plain if options.threshold is None else "--threshold")
    steps, promise = calibrated["confidence"], calibrated["promise"]
    expert = None if served.expert is None else served.expert.path
    why = why_other(calibrated, ref, expert)
    # What scores meant before says little of a student that has learned on.
    meaning = None if why else functools.partial(confidence, steps)
    if options.threshold is not None:
        return Rule(options.threshold, meaning, "--threshold")
    said = f"calibrated, {promise['kind']} {promise['target']:g}"
    return Rule(promise["threshold"], meaning, f"{said}, but {why}" if why else said)


def _listen(host: str, port: int) -> socket.socket:
    """The listening socket.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host.strip("[]"), port))
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); take "
            "another --port"
        ) from error
    return listening


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn's, that goes on answering 503 while the last requests finish."""

    def __init__(self, service: Service):
        limits = service.options.limits
        super().__init__(
            uvicorn.Config(
                make_app(service),
                http=type("Connection", (_Connection,), {"seconds": limits.body_seconds}),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=limits.connections,
                h11_max_incomplete_event_size=_MOST_HEADERS,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=5,
            )
        )
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets requests finish; the second ends."""
        admission = self._service.admission
        if admission.draining:
            self.force_exit = self.should_exit = True
            return
        admission.draining = True
        self._service.log.write(
            "stopping", signal=signal.Signals(sig).name, inside=admission.inside
        )

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: is there anything left to do?"""
        if self._service.admission.draining and not self._service.admission.inside:
            self.should_exit = True
        return await super().on_tick(counter)


class _Connection(H11Protocol):
    """A connection whose headers must come in time: a slow one would stay for ever."""

    seconds: float
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._late = self.loop.call_later(self.seconds, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a request's headers."""
        super().data_received(data)
        begun = self.conn.their_state is not h11.IDLE
        if self._late is not None and begun:
            self._late.cancel()
            self._late = None
        elif self._late is None and not begun and not self.transport.is_closing():
            self._late = self.loop.call_later(self.seconds, self._give_up)

    def _give_up(self) -> None:
        self._late = None
        self.transport.close()
