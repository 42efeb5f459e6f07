"""The process of a server: its socket, its signals, its end."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from cramjax.errors import ConfigError
from cramjax.language_model import LanguageModel
from cramjax.serve.http.answering import Service
from cramjax.serve.http.app import make_app, make_service
from cramjax.serve.http.connection import protocol
from cramjax.serve.http.worker import ServedEngine, Worker
from cramjax.server import ServeConfig

_LONGEST_HEADERS = 64 * 1024
_CONNECTIONS_WAITING, _LAST_PORT = 1024, 65535


def listen(config: ServeConfig) -> socket.socket:
    """The socket that a server listens at, before anything that takes time.

    Raises:
        ConfigError: the address is in use, or is none of this machine's.
    """
    try:
        if config.port > _LAST_PORT:
            raise OverflowError(f"ports go to {_LAST_PORT}")
        family, kind, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
            listening.listen(_CONNECTIONS_WAITING)  # now, so that a second server is told
        except OSError:
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"cannot listen at {config.host}, port {config.port}: {why}. Give another --port (0: any that is free) or "
            "--host."
        ) from None
    return listening


def run_server(
    model: LanguageModel,
    engine: ServedEngine,
    config: ServeConfig,
    listening: socket.socket,
    tell: Callable[[str], None],
    adapters: tuple[str, ...] = (),
) -> None:
    """Serve a model until SIGTERM or SIGINT; then end what is in progress, for `drain_seconds` at most.

    Args:
        model: what is served.
        engine: over it.
        config: to whom, and how much.
        listening: from `listen`.
        tell: is told where the server is, and why it ends.
        adapters: names of those that the engine has.

    Raises:
        DataError: the chat template cannot be read.
    """
    service = make_service(model, engine, config, adapters)
    server = _Server(settings(service), service.worker, config.drain_seconds, tell)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    tell(f"{service.served.name} is at http://{shown}:{port}")
    asyncio.run(server.serve(sockets=[listening]))


def settings(service: Service) -> uvicorn.Config:
    """What uvicorn is to do for a service."""
    config = service.config
    return uvicorn.Config(
        make_app(service),
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        http=protocol(config.connections, config.body_seconds),
        ws="none",
        limit_concurrency=config.connections + 1,
        h11_max_incomplete_event_size=_LONGEST_HEADERS,
        timeout_graceful_shutdown=int(config.drain_seconds) + 5,
    )


class _Server(uvicorn.Server):
    """A server whose signals end it in two steps: nothing new, then nothing at all."""

    def __init__(self, config: uvicorn.Config, worker: Worker, seconds: float, tell: Callable[[str], None]):
        super().__init__(config)
        self._worker, self._seconds, self._tell = worker, seconds, tell

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain at the first signal, abort at the second."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._drain, signal.Signals(number).name)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _drain(self, name: str) -> None:
        if self._worker.is_draining or not self._seconds:
            self._worker.abort()
        else:
            self._tell(f"{name}: no new requests; those in progress have {self._seconds:g} seconds.")
            asyncio.get_running_loop().call_later(self._seconds, self._worker.abort)
        self._worker.is_draining = True
        self.should_exit = True
