"""A server under clients that do everything wrong: what it answers, how long it takes, and what it keeps in memory.

A server of its own is started on a tiny model (or on MODEL). Each kind of client comes twice; memory is what the second
time adds.

- malformed: bodies with fields that are junk, JSON that is broken, HTTP that is none; no answer may be 5xx but 503;
- slow: bodies that come a byte at a time, answers that are read a byte at a time; meanwhile others are served;
- leaving: streams whose clients leave after the first token; a moment later nothing is in progress;
- concurrent: all at once; each is answered, or told to come again.

    python benchmarks/storm.py [MODEL] [--quick] [--json PATH]
"""

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

FINE = {200, 400, 404, 405, 408, 413, 503}
_SECONDS = 60.0
_STREAM = {"prompt": "the stack walks", "max_tokens": 64, "ignore_eos": True, "stream": True}
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "the", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "the"}], "max_tokens": 2},
    "/tokenize": {"prompt": "the"},
    "/detokenize": {"tokens": [5, 6]},
    "/v1/embeddings": {"input": "the"},
}
_JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 1.5, -0.0, 1e308, 2**31, 2**63, -(2**63) - 1, 10**400),
    *("", "a", "1", "🙂", "\ud800", "\x00", "a" * 5000),
    *([], [[]], [None], [1, "a"], ["a"] * 300, [["a", [5]]], {}, {"": {}}, {"a": [{}]}, {"1": 5}),
    *({"type": "json_schema"}, {"type": "json_object"}, {"choice": ["a"]}, {"grammar": "start: start"}),
    *({"regex": "(a|a)*b"}, {"regex": "a{1,100000}"}, {"json": {"$ref": "#"}}),
    {"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"type": "function", "function": {"name": "a"}}],
]
_BROKEN = (b"", b"[" * 50_000, b"3", b"null", b'{"a":NaN}', b"\xff\xfe")
_HEADERS = ("expect: 100-continue\r\n", "accept: x/y\r\n", f"x-a: {'a' * 9000}\r\n")
_NO_HTTP = (
    b"\x16\x03\x01\x02",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST\r\n\r\n",
    b"{}",
    b"\r\n" * 20,
    b"GET /\0 HTTP/1.1\r\n\r\n",
)


async def exchange(url: str, raw: bytes, pause: float = 0.0, leave_after: int | None = None) -> tuple[int, bytes]:
    """Send bytes, and read what comes: the status (0: the connection ended without one), and the body.

    Args:
        url: of the server.
        raw: a request, as bytes.
        pause: seconds between its bytes, and between those of the answer.
        leave_after: bytes of the answer after which the client leaves.
    """
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    received = b""

    async def write() -> None:
        with contextlib.suppress(ConnectionError):  # it has answered, and does not listen any more
            for part in (bytes([byte]) for byte in raw) if pause else [raw]:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
            if raw in _NO_HTTP and writer.can_write_eof():
                writer.write_eof()  # else a server may wait for the rest of what is no request

    writing = asyncio.create_task(write())
    try:
        while chunk := await asyncio.wait_for(reader.read(1 if pause and received else 65536), _SECONDS):
            received += chunk
            await asyncio.sleep(pause)
            if leave_after is not None and len(received) >= leave_after:
                writer.transport.abort()
                break
    except ConnectionError:
        pass
    finally:
        writing.cancel()
        writer.close()
    head, _, body = received.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100"):  # the answer comes after it
        head, _, body = body.partition(b"\r\n\r\n")
    status = head.split(b" ")[1:2]
    return (int(status[0]) if status and status[0].isdigit() else 0), body


def post(path: str, body: bytes, method: str = "POST", more: str = "") -> bytes:
    """A request as bytes."""
    head = f"{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\n{more}"
    return head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body


def wrong_request(draw: random.Random, fields: dict[str, list[str]]) -> bytes:
    """A request with something wrong in it, most of the time."""
    path = draw.choice(list(_BODIES))
    body = dict(_BODIES[path])
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        body[draw.choice(fields[path] if draw.random() < 0.95 else ["", "temprature", "\ud800"])] = draw.choice(_JUNK)
    raw = json.dumps(body).encode()
    kind = draw.random()
    if kind < 0.7:
        return post(path, raw)
    if kind < 0.8:  # some bytes of it are others
        spoiled = bytearray(raw)
        for _ in range(draw.randint(1, 4)):
            spoiled[draw.randrange(len(spoiled))] = draw.randrange(256)
        return post(path, bytes(spoiled))
    if kind < 0.86:
        return post(path, draw.choice((*_BROKEN, raw[: len(raw) // 2])))
    if kind < 0.92:
        method = draw.choice(("GET", "PUT", "DELETE", "OPTIONS", "HEAD", "BREW"))
        return post(draw.choice((path, "/", "/nowhere", "/v1/models/%2e%2e", "/v1/models/\\")), raw, method)
    if kind < 0.96:
        return post(path, raw, more=draw.choice(_HEADERS))
    return draw.choice(_NO_HTTP)


async def malformed(url: str, number: int, seed: int = 0, at_once: int = 32) -> Counter[int]:
    """How often each status answered wrong requests."""
    draw = random.Random(seed)
    described = json.loads((await exchange(url, post("/openapi.json", b"", "GET")))[1])["paths"]

    def names(path: str) -> list[str]:
        return list(described[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"])

    fields = {path: names(path) for path in _BODIES}
    found: Counter[int] = Counter()
    room = asyncio.Semaphore(at_once)

    async def one(raw: bytes) -> None:
        async with room:
            status, _ = await exchange(url, raw)
            found[status] += 1
            if status not in FINE | {0, 431}:
                print(f"{status}: {raw[:500]!r}", file=sys.stderr)

    await asyncio.gather(*(one(wrong_request(draw, fields)) for _ in range(number)))
    return found


async def slow(url: str, number: int, pause: float) -> tuple[Counter[int], Counter[int]]:
    """Statuses of clients that take their time, and of others that are served meanwhile."""
    raw = post("/v1/completions", json.dumps(_STREAM | {"max_tokens": 4}).encode())
    late = [asyncio.create_task(exchange(url, raw, pause)) for _ in range(number)]
    quick = post("/v1/completions", json.dumps(_BODIES["/v1/completions"]).encode())
    others = [await exchange(url, quick) for _ in range(10)]
    return Counter(status for status, _ in await asyncio.gather(*late)), Counter(status for status, _ in others)


async def leaving(url: str, number: int) -> tuple[Counter[int], float]:
    """Statuses of clients that leave, and seconds until nothing is in progress any more."""
    raw = post("/v1/completions", json.dumps(_STREAM).encode())
    found = await asyncio.gather(*(exchange(url, raw, leave_after=300) for _ in range(number)))
    began = time.monotonic()
    while time.monotonic() - began < _SECONDS:
        metrics = (await exchange(url, post("/metrics", b"", "GET")))[1].decode()
        kinds = ("num_requests_running", "num_requests_waiting")
        lines = [line for line in metrics.splitlines() if line.startswith(tuple(f"cramjax:{kind}" for kind in kinds))]
        if lines and all(float(line.rpartition(" ")[2]) == 0 for line in lines):
            break
        await asyncio.sleep(0.02)
    return Counter(status for status, _ in found), time.monotonic() - began


async def concurrent(url: str, number: int) -> Counter[int]:
    """Statuses of requests that come all at once."""
    raw = post("/v1/completions", json.dumps(_BODIES["/v1/completions"]).encode())
    return Counter(status for status, _ in await asyncio.gather(*(exchange(url, raw) for _ in range(number))))


async def storm(url: str, process: psutil.Process, share: float) -> dict[str, Any]:
    """All of it, twice."""
    found: dict[str, Any] = {}
    for turn in ("first", "second"):
        began = time.monotonic()
        statuses = await malformed(url, int(10_000 * share), seed=ord(turn[0]))
        late, others = await slow(url, int(50 * share) + 1, pause=0.02)
        left, seconds = await leaving(url, int(200 * share))
        at_once = await concurrent(url, int(1000 * share))
        found[turn] = {
            "malformed": dict(sorted(statuses.items())),
            "slow": {"late": dict(late), "others": dict(others)},
            "leaving": {"statuses": dict(left), "seconds_until_idle": seconds},
            "concurrent": dict(at_once),
            "seconds": time.monotonic() - began,
            "memory_mib": process.memory_info().rss / 2**20,
        }
    wrong = {status for turn in found.values() for status in turn["malformed"] if status >= 500 and status != 503}
    growth = found["second"]["memory_mib"] - found["first"]["memory_mib"]
    return found | {"server_errors": sorted(wrong), "memory_growth_mib": growth}


def main() -> None:
    from serve import random_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="A run or a model directory. Default: tiny, random weights.")
    parser.add_argument("--quick", action="store_true", help="A twentieth of the clients.")
    parser.add_argument("--json", metavar="PATH", help="Also write the figures to this file.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = args.model or str(random_model(Path(directory) / "random", quick=True))
        command = [sys.executable, "-m", "cramjax.cli", "serve", model, "--port=0", "--chat_template=plain"]
        command += ["--body_seconds=5", "--queue=256"]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8")
        try:
            assert server.stderr is not None
            said = next((line for line in server.stderr if " is at http://" in line), None)
            if said is None:
                raise SystemExit(f"{' '.join(command)} has ended before it served: try it alone.")
            # What it logs is read to the end: a pipe that is full stops who writes into it.
            threading.Thread(target=server.stderr.read, daemon=True).start()
            share = 0.05 if args.quick else 1.0
            found = asyncio.run(storm(said.split()[-1], psutil.Process(server.pid), share))
        finally:
            server.terminate()
            server.wait()
    print(json.dumps(found, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
