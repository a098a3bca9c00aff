"""The server's process: uvicorn, signals, and patience with slow clients.

SIGTERM and SIGINT: what was accepted is finished, nothing new is. SIGHUP: the model is looked up
and loaded anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from teasr.server.app import build_app
from teasr.server.models import ModelSource
from teasr.server.service import Service
from teasr.server.settings import ServerSettings

if TYPE_CHECKING:
    from mlflow import MlflowClient

_HEADER_SECONDS = 10.0  # within which a request's header must arrive
_HEADER_BYTES = 16 * 1024
_UNREAD_SECONDS = 60  # until a client that does not take its answer is cut off
_LATE = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n"
    b'{"error_code": "REQUEST_TIMEOUT", "message": "The request did not arrive in time."}'
)


def make_service(
    model: str, settings: ServerSettings, client: MlflowClient | None = None
) -> Service:
    """A service with `model` loaded.

    Args:
        model: as for `teasr.registry.resolve`.
        client: default `connect()`, when MLflow is needed to find the model.

    Raises:
        TeasrError: as of `ModelSource`.
    """
    recorder = None
    if settings.record_inputs:
        from teasr.drift import InputRecorder

        recorder = InputRecorder(settings.record_inputs)
    return Service(ModelSource(model, client), settings, recorder)


def serve(
    model: str,
    settings: ServerSettings,
    host: str,
    port: int,
    started: Callable[[str], None],
) -> None:
    """Serve until a signal asks to end.

    Args:
        model: as for `teasr.registry.resolve`.
        started: called with the version once requests are answered.

    Raises:
        TeasrError: as of `make_service`.
    """
    service = make_service(model, settings)
    config = uvicorn.Config(
        build_app(lambda: service),
        host=host,
        port=port,
        http=_PatientProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(settings.timeout + settings.body_timeout),
        h11_max_incomplete_event_size=_HEADER_BYTES,
    )
    _Server(config, service, started).run()


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, service: Service, told: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._told = told

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._service.source.wake)
        self._told(self._service.source.current.version)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: a graceful end is an end, and no death by signal."""
        yield

    def _stop(self) -> None:
        self.force_exit = self.should_exit  # asked twice
        self.should_exit = self._service.stopping = True


class _PatientProtocol(H11Protocol):
    """Waits a while for a request's header, and a while for its answer to be taken."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection: socket.socket = transport.get_extra_info("socket")
            milliseconds = 1000 * _UNREAD_SECONDS
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._expect_header()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._clear()

    def _expect_header(self) -> None:
        between = self.cycle is None or self.cycle.response_complete
        if not between:
            self._clear()
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEADER_SECONDS, self._late)

    def _clear(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(_LATE)
            self.transport.close()
