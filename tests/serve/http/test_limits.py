"""Too much, too slow, too late, gone: what the server does then."""

import asyncio
import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.testclient import TestClient

from cramjax.serve.http import answering
from cramjax.serve.http.answering import Service
from cramjax.serve.http.app import make_app
from cramjax.serve.http.asked import Asked

from .conftest import listening

MakeService = Callable[..., Service]
ROUTE = "/v1/completions"


@dataclass
class Call:
    """One request to an ASGI application, whose client may leave."""

    app: Any
    body: dict[str, Any]
    path: str = ROUTE
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    received: bytes = b""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    reads: int = 1_000_000
    """Messages that are read; then its client reads no more."""
    state: dict[str, Any] = field(default_factory=dict)

    async def run(self) -> "Call":
        raw = json.dumps(self.body).encode()
        scope = {"type": "http", "method": "POST", "path": self.path, "raw_path": self.path.encode(), "headers": []}
        scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("test", 80), "root_path": ""}
        scope["state"] = self.state
        messages = [{"type": "http.request", "body": raw, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if not self.reads:
                await asyncio.Event().wait()
            self.reads -= 1
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                self.received += message["body"]

        await asyncio.wait_for(self.app(scope, receive, send), 20)
        return self


@contextlib.asynccontextmanager
async def running(service: Service) -> AsyncIterator[Any]:
    """The application of a service, with its engine's thread."""
    service.worker.start()
    try:
        yield make_app(service)
    finally:
        service.worker.engine.going.set()  # type: ignore[attr-defined]
        await asyncio.to_thread(service.worker.stop)


async def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    for _ in range(int(seconds / 0.01)):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not become true")


def run(test: Awaitable[None]) -> None:
    asyncio.run(test)  # type: ignore[arg-type]


def test_past_the_queue_is_503_at_once_and_nothing_was_done(service_of: MakeService):
    async def test() -> None:
        service = service_of(slots=2, queue=1)
        parrot: Any = service.worker.engine
        parrot.going.clear()
        async with running(service) as app:
            taken = [asyncio.create_task(Call(app, {"prompt": "the", "max_tokens": 2}).run()) for _ in range(3)]
            await until(lambda: service.worker._places == 3)
            assert (service.worker.running, service.worker.waiting) == (2, 1)
            refused = await Call(app, {"prompt": "the", "max_tokens": 2}).run()
            assert refused.status == 503 and refused.headers["retry-after"] == "1"
            assert json.loads(refused.received)["error"]["code"] == "queue_full"
            parrot.going.set()
            assert [(await each).status for each in taken] == [200] * 3
            assert (await Call(app, {"prompt": "the", "max_tokens": 2, "n": 3}).run()).status == 200
            assert parrot.added == 6 and service.worker._places == service.worker._waiting_tokens == 0

    run(test())


def test_prompts_that_wait_are_counted_in_tokens_too(service_of: MakeService):
    async def test() -> None:
        service = service_of(slots=1, queue=50, queue_tokens=5)
        parrot: Any = service.worker.engine
        parrot.going.clear()
        async with running(service) as app:
            taken = asyncio.create_task(Call(app, {"prompt": [5] * 9, "max_tokens": 2}).run())
            await until(lambda: service.worker._waiting_tokens == 9)
            assert (await Call(app, {"prompt": [5], "max_tokens": 2}).run()).status == 503
            parrot.going.set()
            assert (await taken).status == 200

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_200_clients_that_leave_are_stopped_and_the_next_is_served(service_of: MakeService, stream: bool):
    async def test() -> None:
        service = service_of(slots=8, queue=300, seconds=0.001)
        parrot: Any = service.worker.engine
        async with running(service) as app:
            body = {"prompt": "the", "max_tokens": 250, "ignore_eos": True, "stream": stream}
            calls = [Call(app, body) for _ in range(200)]
            tasks = [asyncio.create_task(call.run()) for call in calls]
            await until(lambda: parrot.added == 200)
            for call in calls:
                call.gone.set()
            await asyncio.gather(*tasks)
            began = time.monotonic()
            assert (await Call(app, {"prompt": "the", "max_tokens": 2}).run()).status == 200
            assert time.monotonic() - began < 5 and len(parrot.cancelled) == 200
            assert not parrot.requests and not service.worker._tickets and service.worker._places == 0

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_ends_all_requests_with_an_error(service_of: MakeService, stream: bool):
    async def test() -> None:
        service = service_of(seconds=0.002)
        parrot: Any = service.worker.engine
        async with running(service) as app:
            call = Call(app, {"prompt": "the", "max_tokens": 250, "ignore_eos": True, "stream": stream})
            task = asyncio.create_task(call.run())
            await until(lambda: bool(call.received) if stream else parrot.added == 1)
            parrot.fault = RuntimeError("the pool is gone")
            await task
            assert call.status == (200 if stream else 503)
            error = json.loads(call.received.split(b"\n\n")[-3].removeprefix(b"data: ") if stream else call.received)
            assert error["error"]["code"] == "engine_error"
            after = await Call(app, {"prompt": "the"}).run()
            assert after.status == 503 and b"the pool is gone" in after.received
            assert service.worker.failure is not None

    run(test())


def test_time_is_limited(service_of: MakeService):
    async def test() -> None:
        service = service_of(seconds=0.02, request_seconds=0.1)
        async with running(service) as app:
            for stream in (False, True):
                call = await Call(app, {"prompt": "the", "max_tokens": 250, "ignore_eos": True, "stream": stream}).run()
                assert call.status == (200 if stream else 503) and b'"code":"timeout"' in call.received
            await until(lambda: not service.worker.engine.requests)  # type: ignore[attr-defined]

    run(test())


@pytest.mark.parametrize("reads", [2, 40])
def test_who_does_not_read_holds_no_place(service_of: MakeService, monkeypatch: pytest.MonkeyPatch, reads: int):
    """In the middle of its answer, or when nothing but the end of it is left: its connection is dropped."""
    monkeypatch.setattr(answering, "_LAST_SECONDS", 0.1)
    dropped: list[bool] = []

    async def test() -> None:
        # One is late; the other's whole answer must have come in time.
        service = service_of(seconds=0.002, request_seconds=0.3 if reads == 2 else 5)
        async with running(service) as app:
            count = 250 if reads == 2 else reads - 1
            body = {"prompt": "the", "max_tokens": count, "ignore_eos": True, "stream": True, "allowed_token_ids": [70]}
            call = Call(app, body, reads=reads)
            call.state["drop"] = lambda: dropped.append(True)
            task = asyncio.create_task(call.run())
            await until(lambda: service.worker._places == 1)
            await until(lambda: service.worker._places == 0)
            await task
            assert call.received.startswith(b"data: ") and b"DONE" not in call.received and dropped == [True]
            assert (await Call(app, {"prompt": "the", "max_tokens": 2}).run()).status == 200

    run(test())


def test_more_choices_than_places_are_refused_before_they_are_made(
    service_of: MakeService, monkeypatch: pytest.MonkeyPatch
):
    """And those that are made are made in another thread than the one that serves everybody."""
    threads: list[threading.Thread] = []
    made = Asked.requests

    def requests(asked: Asked, context: int) -> Any:
        threads.append(threading.current_thread())
        return made(asked, context)

    monkeypatch.setattr(Asked, "requests", requests)

    async def test() -> None:
        service = service_of(slots=2, queue=1)
        async with running(service) as app:
            refused = await Call(app, {"prompt": ["the"] * 256, "n": 16}).run()
            assert refused.status == 400 and b"too_many" in refused.received and not threads
            assert (await Call(app, {"prompt": "the", "n": 3, "max_tokens": 1}).run()).status == 200
            assert threads and threads[0] is not threading.current_thread()

    run(test())


def test_a_head_must_come_in_time_however_it_comes(service_of: MakeService):
    """Nothing, half of it, or a byte now and then: closed, the second head of a connection too."""
    with listening(service_of(body_seconds=0.4)) as url:
        host, port = url.removeprefix("http://").split(":")
        whole, half = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n", b"GET /health HTTP/1.1\r\n"
        for first, then in ((b"", b""), (half, b""), (half, b"x"), (whole + half, b"x"), (whole + half, b"")):
            with socket.create_connection((host, int(port)), timeout=0.05) as client:
                client.sendall(first)
                received, closed = b"", False
                for _ in range(100):
                    try:
                        client.sendall(then)
                        some = client.recv(4096)
                        received, closed = received + some, not some
                    except TimeoutError:
                        continue
                    except OSError:
                        closed = True
                    if closed:
                        break
                assert closed and (b"200 OK" in received) == first.startswith(whole)
                assert then or received.count(b"408 Request Timeout") == 1


def test_connections_past_the_limit_get_503_and_past_twice_it_nothing(service_of: MakeService):
    with listening(service_of(connections=2)) as url, contextlib.ExitStack() as open_:
        host, port = url.removeprefix("http://").split(":")

        def connect() -> socket.socket:
            return open_.enter_context(socket.create_connection((host, int(port)), timeout=5))

        def answer(client: socket.socket) -> bytes:
            try:
                client.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
                return client.recv(4096)
            except OSError:
                return b""

        first, second = connect(), connect()
        assert answer(first).startswith(b"HTTP/1.1 200") and answer(second).startswith(b"HTTP/1.1 200")
        third, fourth = connect(), connect()
        assert answer(connect()) == b""
        for late in (third, fourth):
            assert answer(late).startswith(b"HTTP/1.1 503") and late.recv(1) == b""
        assert answer(second).startswith(b"HTTP/1.1 200")


def test_draining_ends_what_is_in_progress_and_takes_nothing_new(service_of: MakeService):
    async def test() -> None:
        service = service_of(seconds=0.005)
        async with running(service) as app:
            call = Call(app, {"prompt": "the", "max_tokens": 250, "ignore_eos": True})
            task = asyncio.create_task(call.run())
            await until(lambda: bool(service.worker._tickets))
            service.worker.is_draining = True
            assert (await Call(app, {"prompt": "the"}).run()).status == 503
            service.worker.abort()
            await task
            assert json.loads(call.received)["choices"][0]["finish_reason"] == "abort"

    run(test())


def test_bodies_are_limited_in_size_and_time(service_of: MakeService):
    service = service_of(body_bytes=1000, body_seconds=0.05)
    with TestClient(make_app(service)) as client:
        for path in (ROUTE, "/tokenize"):
            answer = client.post(path, content=b" " * 1001)
            assert answer.status_code == 413 and answer.headers["connection"] == "close"

    async def test() -> None:
        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.03)
            return {"type": "http.request", "body": b" ", "more_body": True}

        statuses: list[int] = []

        async def send(message: dict[str, Any]) -> None:
            statuses.append(message.get("status", 0))

        scope = {"type": "http", "method": "POST", "path": ROUTE, "headers": [], "query_string": b"", "root_path": ""}
        await make_app(service)(scope, receive, send)  # type: ignore[arg-type]
        assert statuses[0] == 408

    run(test())


def test_a_key_is_wanted_on_every_route_but_health(service_of: MakeService):
    def basic(word: str) -> str:
        return "Basic " + base64.b64encode(word.encode()).decode()

    with TestClient(make_app(service_of(api_key="sesame"))) as client:
        assert client.get("/health").status_code == client.get("/ping").status_code == 200
        routes = ["/", "/metrics", "/load", "/v1/models", "/tokenizer_info", "/nowhere", "/version", "/health/"]
        for path in routes:
            for given in ({}, {"authorization": "Bearer sesam"}, {"authorization": basic("sesame:x")}):
                answer = client.get(path, headers=given, follow_redirects=False)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", path
        assert client.post(ROUTE, json={"prompt": "the"}).status_code == 401
        assert "Basic" in client.get("/").headers["www-authenticate"]  # a browser then asks
        for given in ("Bearer sesame", basic("me:sesame")):
            assert client.get("/v1/models", headers={"authorization": given}).status_code == 200


def test_each_request_has_a_number(client: TestClient):
    given = client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"]
    others = {client.get(path).headers["x-request-id"] for path in ("/health", "/nowhere", "/v1/models")}
    assert given == "mine-1" and len(others) == 3
    assert client.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"
