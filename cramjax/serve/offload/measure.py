"""What a machine does in a second, measured with the model's own programs: the constants of the cost model.

Products, attention and what a batch is handed over with are timed once for a shape of model and a machine, and kept.
The disk is timed each time: what it reaches depends on what else it does.
"""

import functools
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from cramjax.cache import cache_directory, write_atomically
from cramjax.devices import cpu_fingerprint, usable_cores
from cramjax.serve.offload.caches import Caches
from cramjax.serve.offload.cost_model import Machine, Work
from cramjax.serve.offload.draws import drawing
from cramjax.serve.offload.layout import Layout, Stage, stage_shapes
from cramjax.serve.offload.programs import Programs, empty_text
from cramjax.serve.offload.store import ScratchFile, buffer, read_at, scratch
from cramjax.serve.request import SamplingParameters

_PROMPT_TOKENS = 1024
"""Most tokens of prompts that are timed together; more of them are as fast each."""
_DISK = 48 << 20
"""Bytes: more than caches hold."""
_CHUNK = 8 << 20
_PIECE, _PIECES = 4096, 256
"""Bytes of a small piece, and how many are timed together."""
_ROUNDS = 3
_USUAL = 8
"""Rows of the batch beside which reading is timed."""


@dataclass(frozen=True)
class Disk:
    """Bytes per second, in large pieces and past the operating system's cache; seconds of a small piece."""

    read: float
    write: float
    file: Path
    """That can be read to time other things beside it."""
    piece_read: float = 0.0
    piece_written: float = 0.0


def measure_disk(directory: Path, file: Path, size: int = _DISK) -> Disk:
    """Time reading and writing.

    Args:
        directory: where is written.
        file: that is read: a model's own.
        size: bytes.
    """
    out = buffer(size)
    with scratch(directory) as made:
        own = made.file("speed", size)
        out[:] = np.arange(size, dtype=np.uint32).view(np.uint8)[:size]
        began = time.perf_counter()
        own.write(0, out)
        os.fsync(own.number)
        written = size / (time.perf_counter() - began)
        pieces = [_mean(lambda each=each: each(own)) / _PIECES for each in (_write_pieces, _read_pieces)]
    seconds = []
    with file.open("rb", buffering=0) as opened:
        size = min(size, file.stat().st_size)
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            read_at(opened.fileno(), 0, out[:size], file)
            seconds.append(time.perf_counter() - began)
    return Disk(size / sorted(seconds)[_ROUNDS // 2], written, file, pieces[1], pieces[0])


def _write_pieces(file: ScratchFile) -> int:
    """As a step writes keys and values of its tokens; how many pieces."""
    own = np.zeros(_PIECE, np.uint8)
    for number in range(_PIECES):
        file.write(2 * number * _PIECE, own)
    return _PIECES


def _read_pieces(file: ScratchFile) -> int:
    out = buffer(_PIECE)
    for number in range(_PIECES):
        file.read(2 * number * _PIECE, out, drop=False)
    return _PIECES


def lost_beside(compute: Callable[[], Any], work: Callable[[], int]) -> float:
    """Seconds that computing loses to each unit of what another thread does at the same time.

    Args:
        compute: is called over and over, alone and beside the other.
        work: does some of it, and says how many units.
    """
    done, count = threading.Event(), [0]

    def go_on() -> None:
        while not done.is_set():
            count[0] += work()

    alone = _mean(compute)
    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        before = count[0]
        began = time.perf_counter()
        beside = _mean(compute)
        rate = (count[0] - before) / (time.perf_counter() - began)
    finally:
        done.set()
        thread.join()
    return max(0.0, beside - alone) / (rate * beside) if rate else 0.0


@dataclass(frozen=True)
class Losses:
    """Seconds that computing loses to what streams do beside it."""

    byte_read: float
    byte_written: float
    piece: float


def measure_losses(disk: Disk, directory: Path, compute: Callable[[], Any], size: int = _DISK) -> Losses:
    """Compute beside a thread that reads, one that writes, and one that does both in small pieces.

    Args:
        disk: what is read.
        directory: where is written.
        compute: is called over and over.
        size: bytes that are read or written in turn.
    """
    size = min(size, disk.file.stat().st_size)
    out, at = buffer(size), [0]

    def chunk() -> np.ndarray:
        at[0] = 0 if at[0] + _CHUNK > size else at[0]
        own = out[at[0] : at[0] + _CHUNK]
        at[0] += len(own)
        return own

    def read() -> int:
        own = chunk()
        read_at(opened.fileno(), at[0] - len(own), own, disk.file)
        return len(own)

    def write() -> int:
        own = chunk()
        file.write(at[0] - len(own), own)
        return len(own)

    with disk.file.open("rb", buffering=0) as opened, scratch(directory) as made:
        file = made.file("speed", max(size, 2 * _PIECES * _PIECE))
        pieces = lost_beside(compute, lambda: _write_pieces(file) + _read_pieces(file))
        return Losses(lost_beside(compute, read), lost_beside(compute, write), pieces)


def _mean(run: Callable[[], Any], seconds: float = 0.3) -> float:
    """Seconds of a call, of as many as fit some time."""
    jax.block_until_ready(run())
    began, calls = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        jax.block_until_ready(run())
        calls += 1
    return (time.perf_counter() - began) / calls


class Measured:
    """The constants of the machine that this runs on.

    Args:
        programs: of a batch of a size.
        layout: the model's stages.
        work: what is asked.
        disk: its speed.
        device: that computes.
        shape: of keys and values, by rows and places.
        host: the device of the host's memory.
        attend_on_host: whether attention to a cache in the host's memory is computed there.
        directory: where scratch files are written.
        path: of the file that keeps what was timed.
    """

    def __init__(
        self,
        programs: Callable[[int], Programs],
        layout: Layout,
        work: Work,
        disk: Disk,
        device: Any,
        shape: Callable[[int, int], Any],
        host: Any,
        attend_on_host: bool,
        directory: Path,
        path: Path | None = None,
    ):
        self._programs, self._layout, self._work = programs, layout, work
        self._disk, self._device, self._shape = disk, device, shape
        self._host, self._on_host, self._directory = host, attend_on_host, directory
        self._path = cache_directory() / "offload.json" if path is None else path
        self._links = _links(device)

    def machine(self, batch: int) -> Machine:
        """The constants for batches of so many rows."""
        key, known = self._key(batch), _known(self._path)
        if key not in known:
            known = _known(self._path) | {key: self._timed(batch)}
            write_atomically(self._path, json.dumps(known, indent=1))
        own, work, up, down = known[key], self._work, *self._links
        lost, seconds = self._losses, own["step"]
        held = work.prompt + work.output / 2
        return Machine(
            to_device=up,
            cache_to_host=down,
            hidden_to_host=down,
            disk_read=self._disk.read,
            disk_write=self._disk.write,
            disk_write_cache=self._disk.write,
            products_prompt=own["prompt_tokens"] * work.product_flops / own["prompt"],
            products_step=batch * work.product_flops / seconds,
            attention_prompt=math.inf,  # timed together with products
            attention_step=batch * work.attention_flops * held / own["attention"],
            attention_host=batch * work.attention_flops * held / own["attention"],
            batch_seconds=own["ends"] / work.layers + own["handing"],
            reading_seconds=lost.byte_read,
            writing_seconds=lost.byte_written,
            piece_read=self._disk.piece_read,
            piece_written=self._disk.piece_written,
            piece_seconds=lost.piece,
            weights_read=1.0,
        )

    @functools.cached_property
    def _losses(self) -> Losses:
        """What computing loses to the disk's streams."""
        return measure_losses(self._disk, self._directory, self._step(_USUAL))

    def _step(self, batch: int, params: Any = None, embed: Any = None) -> Callable[[], Any]:
        """A token's step of a batch through a block, but for its attention."""
        programs, work = self._programs(batch), self._work
        params = self._of(self._layout.blocks[0]) if params is None else params
        embed = self._of(self._layout.embed) if embed is None else embed
        one, context = _start(programs, embed, batch, 1, work.length, programs.model.config.width)
        repeat = np.int32(0)
        queries, _, _ = programs.call("project", params, one, context, repeat)
        mixed = jax.device_put(list(queries), self._device)
        return lambda: (
            programs.call("project", params, one, context, repeat),
            programs.call("rest", params, one, context, repeat, mixed),
        )

    def _of(self, stage: Stage) -> Any:
        """Parameters of a stage, on the device; their numbers do not matter."""
        with jax.default_device(self._device):
            return _ones(stage_shapes(stage, len(self._programs(1).model.period)))

    def _key(self, batch: int) -> str:
        programs, work = self._programs(batch), self._work
        model = programs.model
        shapes = [str(stage_shapes(stage, 1)) for stage in (self._layout.blocks[0], self._layout.head)]
        said = json.dumps([repr(model.config), shapes, repr(programs.encoding), programs.by_kernel])
        digest = hashlib.sha256(said.encode()).hexdigest()[:12]
        device = f"{cpu_fingerprint()}-{usable_cores()}-{self._device.device_kind}-jaxlib-{jaxlib.version.__version__}"
        return f"{device}: {digest}, {batch} rows, {work.prompt} + {work.output} tokens"

    def _timed(self, batch: int) -> dict[str, float]:
        """Seconds of a block's parts with a batch, of what it is handed over with, and of both ends."""
        programs, work = self._programs(batch), self._work
        params, embed = self._of(self._layout.blocks[0]), self._of(self._layout.embed)
        repeat, width = np.int32(0), programs.model.config.width
        rows = max(1, min(batch, _PROMPT_TOKENS // work.prompt))
        prompts = self._programs(rows)
        x, context = _start(prompts, embed, rows, work.prompt, work.length, width)
        prompt = _usual(lambda: prompts.call("prompt", params, x, context, repeat))
        del x, context
        one, context = _start(programs, embed, batch, 1, work.length, width)
        queries, new, places = programs.call("project", params, one, context, repeat)
        queries, places = jax.device_put((queries, places), self._device)
        step = _usual(self._step(batch, params, embed))
        held = jax.device_put(_ones(self._shape(batch, work.length)), self._device)
        half = jnp.full_like(places[1].start, work.prompt + work.output // 2 - 1)
        at = replace(places[1], start=half, real=jnp.ones_like(places[1].real))
        attention = _usual(lambda: programs.call("attend", held, queries[1], at))
        del held
        lengths, real = np.asarray(half), np.ones(batch, bool)
        with ThreadPoolExecutor(1) as store:
            caches = self._caches(programs, store)
            caches.fill(0, 0, new)

            def token() -> Any:
                asked, new, _ = programs.call("project", params, one, context, repeat)
                mixed = caches.attend(0, 0, 0, asked, new, [places[0], at, places[2]], lengths, real)
                return programs.call("rest", params, one, context, repeat, mixed)

            whole = _usual(token)
        del params, caches
        head, vocabulary = self._of(self._layout.head), programs.model.vocab_size
        draws = drawing(batch, vocabulary, ())([SamplingParameters()] * batch)
        ends = _usual(
            lambda: (
                _start(programs, embed, batch, 1, work.length, width),
                draws(0, programs.call("head", head, one, np.ones(batch, np.int32))),
            )
        )
        return {
            "prompt": prompt,
            "prompt_tokens": rows * work.prompt,
            "step": step,
            "attention": attention,
            "handing": max(0.0, whole - step - attention),
            "ends": ends,
        }

    def _caches(self, programs: Programs, store: ThreadPoolExecutor) -> Caches:
        """Of a batch in a block, in the host's memory."""
        return Caches(
            programs,
            self._shape,
            blocks=1,
            batches=1,
            places=self._work.length,
            scratch=None,
            load=store,
            store=store,
            host=self._host,
            attend_on_host=self._on_host,
        )


def _start(programs: Programs, embed: Any, batch: int, width: int, places: int, embedding: int) -> tuple[Any, Any]:
    rows = np.ones((batch, width, embedding), np.float32)
    tokens, counts = np.ones((batch, width), np.int32), np.full(batch, width, np.int32)
    text = empty_text(programs.model, batch, places)
    return programs.call("embed", embed, rows, text, tokens, counts)[:2]


def _ones(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def _usual(run: Callable[[], Any], seconds: float = 0.1) -> float:
    """Seconds of the median call, of three at least and as many as fit some time, after one that compiles."""
    jax.block_until_ready(run())
    each, began = [], time.perf_counter()
    while len(each) < 3 or time.perf_counter() < began + seconds:
        start = time.perf_counter()
        jax.block_until_ready(run())
        each.append(time.perf_counter() - start)
    return sorted(each)[len(each) // 2]


@functools.cache
def _links(device: Any) -> tuple[float, float]:
    """Bytes per second up to a device, and down; infinite where its memory is the host's."""
    if device.platform == "cpu":
        return math.inf, math.inf
    host = np.ones(32 << 20, np.uint8)
    there = jax.device_put(host, device)
    up = _usual(lambda: jax.device_put(host, device))
    down = _usual(lambda: np.asarray(there + np.uint8(1)))
    return host.nbytes / up, host.nbytes / down


def _known(path: Path) -> dict[str, Mapping[str, float]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {key: {name: float(value) for name, value in own.items()} for key, own in known.items()}
    except (OSError, ValueError, AttributeError, TypeError):  # none, or damaged
        return {}
