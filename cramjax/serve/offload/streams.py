"""The streams that overlap with computing: each works in order, in a thread of its own; or before anything goes on."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

Schedule = Literal["overlapped", "in_turn"]


class InTurn(Executor):
    """Does what is submitted before it returns."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a function; its exception is raised where its result is asked for."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class Streams:
    """All but computing, which is the caller's."""

    weights: Executor
    """Loads weights."""
    cache_in: Executor
    """Loads caches."""
    cache_out: Executor
    """Stores caches."""
    hidden_in: Executor
    """Loads activations."""
    hidden_out: Executor
    """Stores activations."""


@contextlib.contextmanager
def streams(schedule: Schedule) -> Iterator[Streams]:
    """The streams of a schedule, which end with it.

    Args:
        schedule: `overlapped`, or `in_turn`: nothing is done while something else is.
    """
    if schedule == "in_turn":
        yield Streams(*[InTurn()] * 5)
        return
    with contextlib.ExitStack() as stack:
        yield Streams(*[stack.enter_context(ThreadPoolExecutor(1, f"offload-{number}")) for number in range(5)])
