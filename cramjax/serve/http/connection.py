"""One connection of a client: how long it may take to say what it wants, and how it is dropped."""

import asyncio
from typing import Any

from h11 import IDLE
from uvicorn.protocols.http.h11_impl import H11Protocol

_FULL = 2
"""Times the connections that are served: past them, new ones are not even told so."""


def protocol(connections: int, seconds: float) -> type[H11Protocol]:
    """What connections are, for uvicorn.

    Args:
        connections: that are served; those past twice as many are closed at once.
        seconds: in which the head of a request must have come, from its first byte or the connection's beginning on.
    """

    class Connection(H11Protocol):
        def __init__(self, *given: Any, **named: Any):
            super().__init__(*given, **named)
            self.app_state = {**self.app_state, "drop": self._drop}
            self._late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > _FULL * connections:
                self._drop()
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.trailing_data[0]:  # of the next head, come before this answer ended
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._unwatch()

        def _watch(self) -> None:
            """A head that is not whole has its time; more of it gives it no more."""
            if self.conn.their_state is not IDLE:
                self._unwatch()
            elif self._late is None:
                self._late = self.loop.call_later(seconds, self._too_late)

        def _unwatch(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _too_late(self) -> None:
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()

        def _drop(self) -> None:
            """Close it, whether or not what is written was read."""
            self.transport.abort()

    return Connection
