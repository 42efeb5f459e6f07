"""The thread that owns the engine, and what the server's event loop sees of it.

The loop asks for places before any work is done; requests and cancellations go to the thread through a queue, which it
empties between two rounds of the engine; what the engine says comes back in one call a round.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from cramjax.errors import ConfigError
from cramjax.serve.http.fields import RequestError
from cramjax.serve.request import Reason

_LOG = logging.getLogger("cramjax.serve")


class Loads(Protocol):
    """What an engine holds and has done (`cramjax.serve.engine.Load`)."""

    running: int
    waiting: int
    pages: int
    pages_used: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    guessed_tokens: int
    right_guesses: int
    compilations: int


class Work(Protocol):
    """A request to an engine."""

    @property
    def prompt(self) -> Sequence[int]:
        """The tokens that it is about."""
        ...


class News(Protocol):
    """What an engine says of a request."""

    @property
    def reason(self) -> Reason | None:
        """Why it ended; None: it goes on."""
        ...


class ServedEngine(Protocol):
    """What is served: `cramjax.serve.engine.Engine` or `cramjax.serve.embedder.Embedder`."""

    context: int
    vocab_size: int

    def add(self, request: Any, listener: Callable[[Any], None]) -> int:
        """Let a request wait for its turn."""
        ...

    def cancel(self, number: int) -> None:
        """End a request."""
        ...

    def step(self) -> bool:
        """One round of work; False: nothing to do."""
        ...

    def load(self) -> Any:
        """What it holds and has done."""
        ...


@dataclass(frozen=True)
class Limits:
    """How much may be in progress and wait."""

    slots: int
    queue: int
    queue_tokens: int


class Ticket:
    """A request of the event loop's to the engine, and what came back."""

    def __init__(self, request: Work, inbox: "asyncio.Queue[tuple[int, News | Exception]]", index: int):
        """Put the request's progress into the inbox, beside its index among its siblings."""
        self.request, self.inbox, self.index = request, inbox, index
        self.number: int | None = None
        self.is_over = self.has_begun = False


class Worker:
    """Runs an engine in a thread of its own, for one event loop."""

    def __init__(self, engine: ServedEngine, limits: Limits):
        """Take an engine over, which nobody else may touch from now on."""
        self.engine, self.limits = engine, limits
        self.load: Loads = engine.load()
        """As of the last round."""
        self.failure: str | None = None
        """What ended the engine."""
        self.is_draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._places = self._waiting_tokens = 0
        self._tickets: set[Ticket] = set()
        self._news: list[tuple[Ticket, News | Exception]] = []
        self._thread = threading.Thread(target=self._run, name="cramjax-engine", daemon=True)

    # For the event loop.

    def start(self) -> None:
        """Begin; to be called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its round, and every request with it."""
        self.abort()
        self._orders.put(None)
        self._thread.join(timeout=60)

    @property
    def waiting(self) -> int:
        """Choices that wait or are about to, by what the event loop knows."""
        return max(0, self._places - self.limits.slots)

    @property
    def running(self) -> int:
        """Choices in progress, by what the event loop knows."""
        return self._places - self.waiting

    @contextmanager
    def places(self, count: int, field: str = "n") -> Iterator[None]:
        """Hold places in the queue while requests are made and answered.

        Args:
            count: how many.
            field: of the body, that says so.

        Raises:
            RequestError: there is no room (503), or there never will be (400).
        """
        self.require(count, field)
        self._places += count
        try:
            yield
        finally:
            self._places -= count

    def require(self, count: int, field: str = "n") -> None:
        """Raise what `places` would raise."""
        if self.failure is not None:
            raise RequestError(f"the engine has ended: {self.failure}.", status=503, code="engine_error")
        if self.is_draining:
            raise RequestError("this server is about to end: ask another.", status=503, code="draining")
        most = self.limits.slots + self.limits.queue
        if count > most:
            what = "n times the prompts" if field == "n" else field
            raise RequestError(f"{what} must be at most {most} (slots and queue), got {count}.", field, code="too_many")
        if self._places + count > most:
            raise RequestError(
                f"{self._places} requests are in progress or wait, which is all there is room for: try again later.",
                status=503,
                code="queue_full",
            )
        if self._waiting_tokens >= self.limits.queue_tokens:
            raise RequestError(
                f"prompts of {self._waiting_tokens} tokens wait, which is all there is room for: try again later.",
                status=503,
                code="queue_full",
            )

    def submit(self, requests: Sequence[Work]) -> "Answers":
        """Give requests to the engine; whoever calls this closes what it gives."""
        inbox: asyncio.Queue[tuple[int, News | Exception]] = asyncio.Queue()
        tickets = [Ticket(request, inbox, index) for index, request in enumerate(requests)]
        for ticket in tickets:
            self._tickets.add(ticket)
            self._waiting_tokens += len(ticket.request.prompt)
            self._orders.put(lambda ticket=ticket: self._add(ticket))
        return Answers(self, tickets, inbox)

    def cancel(self, ticket: Ticket) -> None:
        """End a request before its next round."""
        if not ticket.is_over:
            self._orders.put(lambda: self._cancel(ticket))

    def forget(self, ticket: Ticket) -> None:
        """End a request of which nobody wants to hear any more."""
        self.cancel(ticket)
        ticket.is_over = True
        self._began(ticket)
        self._tickets.discard(ticket)

    def abort(self) -> None:
        """End all requests."""
        for ticket in list(self._tickets):
            self.cancel(ticket)

    def _deliver(self, news: list[tuple[Ticket, News | Exception]]) -> None:
        for ticket, what in news:
            if ticket.is_over:
                continue
            self._began(ticket)
            if isinstance(what, Exception) or what.reason is not None:
                ticket.is_over = True
                self._tickets.discard(ticket)
            ticket.inbox.put_nowait((ticket.index, what))

    def _began(self, ticket: Ticket) -> None:
        if not ticket.has_begun:
            ticket.has_begun = True
            self._waiting_tokens -= len(ticket.request.prompt)

    # For the thread.

    def _run(self) -> None:
        try:
            has_work = True
            while self._follow_orders(wait=not has_work):
                has_work = self.engine.step()
                self._tell()
        except Exception as error:
            _LOG.exception("the engine has ended")
            self.failure = f"{type(error).__name__}: {error}"
            self._news += [(ticket, error) for ticket in list(self._tickets)]
            self._tell()
            while (order := self._orders.get()) is not None:  # whatever was on its way
                order()
                self._tell()

    def _follow_orders(self, wait: bool) -> bool:
        """Do what was ordered; False: to end."""
        while True:
            try:
                order = self._orders.get(block=wait)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()
            wait = False

    def _tell(self) -> None:
        if self.failure is None:
            self.load = self.engine.load()
        news, self._news = self._news, []
        loop = self._loop
        if news and loop is not None:
            try:
                loop.call_soon_threadsafe(self._deliver, news)
            except RuntimeError:  # the loop is closed: there is nobody to tell
                pass

    def _add(self, ticket: Ticket) -> None:
        if self.failure is not None:
            self._news.append((ticket, RuntimeError(self.failure)))
            return
        try:
            ticket.number = self.engine.add(ticket.request, lambda progress: self._news.append((ticket, progress)))
        except ConfigError as error:
            self._news.append((ticket, error))

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.number is not None and self.failure is None:
            self.engine.cancel(ticket.number)


class Answers:
    """Progress of some requests, in the order in which it comes."""

    def __init__(self, worker: Worker, tickets: Sequence[Ticket], inbox: asyncio.Queue[tuple[int, Any]]):
        """See `Worker.submit`."""
        self._worker, self._tickets, self._inbox = worker, tickets, inbox
        self._open = len(tickets)

    async def next(self) -> tuple[int, Any] | None:
        """Index of a request and its progress; None: all have ended.

        Raises:
            RequestError: the engine refused it, or has ended.
        """
        if not self._open:
            return None
        index, what = await self._inbox.get()
        if isinstance(what, ConfigError):
            raise RequestError(str(what))
        if isinstance(what, Exception):
            raise RequestError(f"the engine has ended ({type(what).__name__}).", status=503, code="engine_error")
        self._open -= what.reason is not None
        return index, what

    def cancel(self, index: int) -> None:
        """End one of the requests, of which progress with a reason will still come."""
        self._worker.cancel(self._tickets[index])

    def close(self) -> None:
        """End all of them, and forget them."""
        for ticket in self._tickets:
            self._worker.forget(ticket)
