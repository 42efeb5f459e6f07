"""Asked to stop: SIGTERM and SIGINT are noted, so that the loop can save before it leaves."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Signals:
    """The signal that arrived, if one has."""

    received: int | None = None


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """Note the first SIGTERM or SIGINT; a second one acts as it would without this.

    Outside the main thread nothing is caught, as Python allows signal handlers there only.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        signals.received = number
        restore()

    for number in previous:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        restore()
