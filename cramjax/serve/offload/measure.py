"""What a machine does in a second, measured with the model's own programs: the constants of the cost model.

Products and attention are timed once for a shape of model and a machine, and kept. The disk is timed each time: what it
reaches depends on what else it does.
"""

import functools
import hashlib
import json
import math
import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from cramjax.cache import cache_directory, write_atomically
from cramjax.devices import cpu_fingerprint, usable_cores
from cramjax.serve.offload.cost_model import Machine, Work
from cramjax.serve.offload.layout import Layout, stage_shapes
from cramjax.serve.offload.programs import Programs, empty_text
from cramjax.serve.offload.store import buffer, read_at, scratch

_PROMPT_TOKENS = 1024
"""Most tokens of prompts that are timed together; more of them are as fast each."""
_DISK = 64 << 20
_ROUNDS = 3


@dataclass(frozen=True)
class Disk:
    """Bytes per second, and what reading costs the processor."""

    read: float
    write: float
    reading_seconds: float
    """Of one core, for each byte."""


def measure_disk(directory: Path | None, file: Path | None, size: int = _DISK) -> Disk:
    """Time reading and writing in a directory, in large pieces and past the operating system's cache.

    Args:
        directory: where is written; None: nowhere.
        file: that is read instead of what was written, if it is large enough: a model's own.
        size: bytes.
    """
    out = buffer(8 << 20)
    written = math.inf
    if directory is not None:
        with scratch(directory) as made:
            own = made.file("speed", size)
            out[:] = np.random.default_rng(0).integers(0, 255, len(out), np.uint8)
            began = time.perf_counter()
            for at in range(0, size, len(out)):
                own.write(at, out)
            os.fsync(own.number)
            written = size / (time.perf_counter() - began)
            if file is None or file.stat().st_size < size:
                read, cost = _read(own.number, size, out)
                return Disk(read, written, cost)
    if file is None:
        return Disk(math.inf, written, 0.0)
    number = os.open(file, os.O_RDONLY)
    try:
        read, cost = _read(number, min(size, file.stat().st_size), out)
        return Disk(read, written, cost)
    finally:
        os.close(number)


def _read(number: int, size: int, out: np.ndarray) -> tuple[float, float]:
    """Bytes per second in the median round, and seconds of a core for each byte."""
    seconds, busy = [], []
    for _ in range(_ROUNDS):
        began, before = time.perf_counter(), _thread_seconds()
        for at in range(0, size, len(out)):
            read_at(number, at, out[: min(len(out), size - at)], "the file that is timed")
        seconds.append(time.perf_counter() - began)
        busy.append(_thread_seconds() - before)
    return size / sorted(seconds)[_ROUNDS // 2], min(busy) / size


def _thread_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return used.ru_utime + used.ru_stime


class Measured:
    """The constants of the machine that this runs on.

    Args:
        programs: of a batch of a size.
        layout: the model's stages.
        work: what is asked.
        disk: its speed.
        device: that computes.
        shape: of keys and values, by rows and places.
    """

    def __init__(
        self,
        programs: Callable[[int], Programs],
        layout: Layout,
        work: Work,
        disk: Disk,
        device: Any,
        shape: Callable[[int, int], Any],
        path: Path | None = None,
    ):
        self._programs, self._layout, self._work = programs, layout, work
        self._disk, self._device, self._shape = disk, device, shape
        self._path = cache_directory() / "offload.json" if path is None else path
        self._links = _links(device)

    def machine(self, batch: int) -> Machine:
        """The constants for batches of so many rows."""
        key, known = self._key(batch), _known(self._path)
        if key not in known:
            known = _known(self._path) | {key: self._timed(batch)}
            write_atomically(self._path, json.dumps(known, indent=1))
        own, work, up, down = known[key], self._work, *self._links
        seconds = own["step"]
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
            batch_seconds=own["ends"] / work.layers,
            reading_seconds=self._disk.reading_seconds / usable_cores(),
            weights_read=1.0,
        )

    def _key(self, batch: int) -> str:
        programs, work = self._programs(batch), self._work
        model = programs.model
        shapes = [str(stage_shapes(stage, 1)) for stage in (self._layout.blocks[0], self._layout.head)]
        said = json.dumps([repr(model.config), shapes, repr(programs.encoding), programs.by_kernel])
        digest = hashlib.sha256(said.encode()).hexdigest()[:12]
        device = f"{cpu_fingerprint()}-{usable_cores()}-{self._device.device_kind}-jaxlib-{jaxlib.version.__version__}"
        return f"{device}: {digest}, {batch} rows, {work.prompt} + {work.output} tokens"

    def _timed(self, batch: int) -> dict[str, float]:
        """Seconds of a block's parts with a batch, and of both ends."""
        programs, work = self._programs(batch), self._work
        model, place = programs.model, 0
        with jax.default_device(self._device):
            params = _ones(stage_shapes(self._layout.blocks[0], len(model.period)))
            embed, head = (
                _ones(stage_shapes(stage, len(model.period))) for stage in (self._layout.embed, self._layout.head)
            )
        repeat, width = np.int32(0), model.config.width
        rows = max(1, min(batch, _PROMPT_TOKENS // work.prompt))
        prompts = self._programs(rows)
        x, context = _start(prompts, embed, rows, work.prompt, work.length, width)
        prompt = _fastest(lambda: prompts.call("prompt", params, x, context, repeat))
        del x, context
        one, context = _start(programs, embed, batch, 1, work.length, width)
        queries, _, places = programs.call("project", params, one, context, repeat)
        queries, places = jax.device_put((queries, places), self._device)
        mixed = list(queries)
        step = _fastest(
            lambda: (
                programs.call("project", params, one, context, repeat),
                programs.call("rest", params, one, context, repeat, mixed),
            )
        )
        held = jax.device_put(_ones(self._shape(batch, work.length)), self._device)
        half = jnp.full_like(places[1].start, work.prompt + work.output // 2 - 1)
        at = replace(places[1], start=half, real=jnp.ones_like(places[1].real))
        attention = _fastest(lambda: programs.call("attend", held, queries[1], at, place=place))
        ends = _fastest(
            lambda: (
                _start(programs, embed, batch, 1, work.length, width),
                programs.call("head", head, one, np.ones(batch, np.int32)),
            )
        )
        return {
            "prompt": prompt,
            "prompt_tokens": rows * work.prompt,
            "step": step,
            "attention": attention,
            "ends": ends,
        }


def _start(programs: Programs, embed: Any, batch: int, width: int, places: int, embedding: int) -> tuple[Any, Any]:
    rows = np.ones((batch, width, embedding), np.float32)
    tokens, counts = np.ones((batch, width), np.int32), np.full(batch, width, np.int32)
    text = empty_text(programs.model, batch, places)
    return programs.call("embed", embed, rows, text, tokens, counts)[:2]


def _ones(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def _fastest(run: Callable[[], Any], rounds: int = 5) -> float:
    """Seconds of the fastest of some rounds, after one that compiles."""
    jax.block_until_ready(run())
    best = math.inf
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - began)
    return best


@functools.cache
def _links(device: Any) -> tuple[float, float]:
    """Bytes per second up to a device, and down; infinite where its memory is the host's."""
    if device.platform == "cpu":
        return math.inf, math.inf
    host = np.ones(32 << 20, np.uint8)
    there = jax.device_put(host, device)
    up = _fastest(lambda: jax.device_put(host, device))
    down = _fastest(lambda: np.asarray(there + np.uint8(1)))
    return host.nbytes / up, host.nbytes / down


def _known(path: Path) -> dict[str, Mapping[str, float]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {key: {name: float(value) for name, value in own.items()} for key, own in known.items()}
    except (OSError, ValueError, AttributeError, TypeError):  # none, or damaged
        return {}
