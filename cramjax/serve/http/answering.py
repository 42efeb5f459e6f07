"""One request for text: read, checked, given to the engine, answered; stopped when its client leaves."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from cramjax.serve.http.answers import Choice, Form, Piece
from cramjax.serve.http.asked import Asked
from cramjax.serve.http.fields import RequestError, read_json
from cramjax.serve.http.metrics import Metrics
from cramjax.serve.http.searching import Searching
from cramjax.serve.http.served import Served
from cramjax.serve.http.worker import Worker
from cramjax.server import ServeConfig


@dataclass(frozen=True)
class Service:
    """What the routes share."""

    served: Served
    worker: Worker
    metrics: Metrics
    config: ServeConfig


class Gone(Exception):
    """The client has left."""


class Stalled(Gone):
    """The client does not read."""


_LAST_SECONDS = 10.0
"""In which a client must read what is left to say when its request has no place any more."""


async def read_body(receive: Receive, config: ServeConfig) -> dict[str, Any]:
    """The object that a request holds.

    Raises:
        RequestError: it is too long (413), too slow (408) or no object (400).
        Gone: the client has left.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                body += message.get("body", b"")
                if len(body) > config.body_bytes:
                    raise RequestError(f"the body must be at most {config.body_bytes} bytes.", status=413)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise RequestError(f"the body must come within {config.body_seconds:g} seconds.", status=408) from None
    return await asyncio.to_thread(read_json, bytes(body)) if len(body) > 100_000 else read_json(bytes(body))


class Answering:
    """A route whose work is the engine's, as an ASGI application: bounded, and stopped when its client leaves."""

    def __init__(self, service: Service):
        """Answer for it."""
        self.service = service

    async def answer(self, values: Mapping[str, Any], send: Send) -> None:
        """Answer what a body asks for."""
        raise NotImplementedError

    def too_late(self) -> RequestError:
        """The error of an answer that takes too long."""
        seconds = self.service.config.request_seconds
        return RequestError(f"no answer within {seconds:g} seconds.", status=503, code="timeout")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        service = self.service
        try:
            values = await read_body(receive, service.config)
            service.worker.require(1)  # before the work of encoding
            work = asyncio.create_task(self.answer(values, send))
            gone = asyncio.create_task(_gone(receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                if not work.done():
                    work.cancel()
                await asyncio.gather(work, gone, return_exceptions=True)
            if not work.cancelled() and (error := work.exception()) is not None:
                raise error
        except RequestError as error:
            service.metrics.refused(error.status)
            raise
        except Stalled:
            drop = scope.get("state", {}).get("drop")  # of `connection`: uvicorn alone waits until all is read
            if drop is not None:
                drop()
                await asyncio.sleep(0)
        except (Gone, OSError):
            pass


class Completing(Answering):
    """The route of completions or of chats."""

    def __init__(self, service: Service, read: Callable[[Mapping[str, Any], Served], Asked]):
        """Answer what bodies ask for, as `read` understands them."""
        super().__init__(service)
        self._read = read

    async def answer(self, values: Mapping[str, Any], send: Send) -> None:
        """Continue what a body holds."""
        service = self.service
        asked = await asyncio.to_thread(self._read, values, service.served)
        late: RequestError | None = None
        with service.worker.places(len(asked.prompts) * asked.n):
            requests = await asyncio.to_thread(asked.requests, service.served.context)
            service.metrics.prompts([len(prompt.ids) for prompt in asked.prompts])
            choices = [Choice(service.served, asked, index) for index in range(len(requests))]
            answers = (
                service.worker.submit(requests)
                if asked.search is None
                else Searching(service.worker, requests[:: asked.n], asked.search)
            )
            pieces = self._pieces(choices, answers)
            form = Form.of(service.served, asked)
            whole, has_begun = [Piece() for _ in choices], False
            try:
                async with asyncio.timeout(service.config.request_seconds):
                    async for choice, piece in pieces:
                        if not asked.stream:
                            whole[choice.index] += piece
                            continue
                        if not has_begun:  # errors before the first piece have a status of their own
                            has_begun = True
                            await _begin_stream(send)
                            for index in range(len(choices)) if asked.chat else ():
                                await _send_event(send, form.first(index))
                        await _send_event(send, form.chunk(choice, piece, choices))
            except TimeoutError:
                late = self.too_late()
                if not has_begun:
                    raise late from None
            except RequestError as error:
                late = error
                if not has_begun:
                    raise
            finally:
                answers.close()
        async with last_words():
            if not asked.stream:
                await send_whole(send, form.whole(choices, whole))
                return
            if late is not None:
                await _send_event(send, late.body())
            elif asked.include_usage:
                await _send_event(send, form.last(choices))
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _pieces(self, choices: list[Choice], answers: Any) -> AsyncIterator[tuple[Choice, Piece]]:
        """What is new of each choice, as it comes."""
        watches = [self.service.metrics.stopwatch() for _ in choices]
        while (came := await answers.next()) is not None:
            index, progress = came
            choice = choices[index]
            if choice.is_over:  # by a stop string; the engine did not know yet
                continue
            before = choice.drawn
            piece = choice.take(progress)
            watches[index].tokens(choice.drawn - before)
            if piece.reason is not None:
                watches[index].ended(piece.reason)
                if progress.reason is None:
                    answers.cancel(index)
            if piece.is_something:
                yield choice, piece


@asynccontextmanager
async def last_words() -> AsyncIterator[None]:
    """Around what is sent when a request has given its places back.

    Raises:
        Stalled: it is not read in time.
    """
    try:
        async with asyncio.timeout(_LAST_SECONDS):
            yield
    except TimeoutError:
        raise Stalled from None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_whole(send: Send, content: Any) -> None:
    """Answer with a value, as JSON."""
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _begin_stream(send: Send) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send_event(send: Send, content: Any) -> None:
    body = f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
    await send({"type": "http.response.body", "body": body.encode("utf-8", "replace"), "more_body": True})
