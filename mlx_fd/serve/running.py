"""The server from its start to its end: signals, slow clients, the listening socket."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_fd.errors import UserError
from mlx_fd.serve.app import make_app
from mlx_fd.serve.calibration import rule_of
from mlx_fd.serve.engine import Engine
from mlx_fd.serve.errors import ApiError
from mlx_fd.serve.kept import Kept
from mlx_fd.serve.limits import Admission
from mlx_fd.serve.logs import Log
from mlx_fd.serve.metrics import Metrics
from mlx_fd.serve.models import Served, open_served
from mlx_fd.serve.reloading import reload
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
    metrics = Metrics()
    engine = Engine(options.limits.places, metrics.took)
    try:
        open_models = functools.partial(
            open_served,
            options.student,
            options.expert,
            options.thoughts,
            speculate=options.speculate,
        )
        served = await engine.start(open_models)
        service = Service(
            options=options,
            engine=engine,
            served=served,
            rule=rule_of(options, served),
            metrics=metrics,
            log=Log(texts=options.log_texts),
            admission=Admission(options.limits),
            kept=_kept(options, served),
            student=options.student,
        )
        server = _Server(service)
        running = asyncio.ensure_future(server.serve(sockets=[listening]))
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        if server.started:
            on_ready(service, _address(listening))
        with _reloading(service):
            await running
        service.close()
    finally:
        listening.close()
        await engine.stop()


@contextlib.contextmanager
def _reloading(service: Service) -> Iterator[None]:
    """Take new weights at each SIGHUP, unless that is ignored (``nohup``)."""
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        yield
        return

    async def take() -> None:
        with contextlib.suppress(ApiError):  # it stands in the log
            await reload(service)

    def heard() -> None:
        task = loop.create_task(take())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGHUP, heard)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, before)


def _kept(options: Options, served: Served) -> Kept | None:
    if options.keep is None:
        return None
    return Kept(options.keep, options.keep_most, served.judge.ref.answer_kind)


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
            # Now, not once models are open: until somebody listens two servers can have one port.
            listening.listen()
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
        # Not in the handler: the signal may have come in the middle of another line of the log.
        asyncio.get_running_loop().call_soon_threadsafe(
            functools.partial(
                self._service.log.write,
                "stopping",
                signal=signal.Signals(sig).name,
                inside=admission.inside,
            )
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
