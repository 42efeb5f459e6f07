"""What is to be known of devices: which is traced for, peak speeds (for utilisation), names, how a CPU keeps memory."""

import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import psutil

from cramjax.cache import cache_directory, write_atomically
from cramjax.gpus import gpu_of_kind
from cramjax.start import start

_R = TypeVar("_R")

_ATTEMPTS, _SHARE = 2, 0.9
"""How often a peak is measured while others are in the way, and the share of its cores below which they are."""

# glibc's malloc.h: M_TRIM_THRESHOLD (never shrink the heap), M_MMAP_MAX (no block outside it), M_ARENA_MAX (one heap).
_MALLOC_OPTIONS = {-1: 2**31 - 1, -4: 0, -8: 1}


@dataclass(frozen=True)
class Target:
    """The device that a function is being traced for."""

    platform: str
    """`cpu`, `gpu` or `tpu`."""
    kind: str
    """Its name, such as `NVIDIA GeForce RTX 4090`."""
    capability: str | None
    """CUDA compute capability, such as `8.9`; None where there is none or it is not known."""
    ahead_of_time: bool = False
    """Whether the device is a description, and nothing will run in this process."""

    def at_least(self, capability: float) -> bool:
        """Whether its CUDA compute capability is known, and not below one."""
        known = self.capability is not None and self.capability[:1].isdigit()
        return known and float(self.capability or 0) >= capability


def target() -> Target:
    """The device that a function is being traced for: an abstract one where ahead-of-time compilation set it
    (`jax.sharding.use_abstract_mesh`), else JAX's default device.
    """
    abstract: Any = jax.sharding.get_abstract_mesh().abstract_device
    device: Any = jax.default_device.value or start()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    # Under a mesh of real devices the abstract one repeats their kind, and knows less.
    if abstract is not None and abstract.device_kind != device.device_kind:
        return replace(target_of(abstract), ahead_of_time=True)
    return target_of(device)


def target_of(device: Any) -> Target:
    """What a program for a device is traced for.

    Args:
        device: a JAX device, or a `jax.sharding.AbstractDevice`.
    """
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    gpu = gpu_of_kind(device.device_kind)
    named = None if gpu is None else ".".join(map(str, gpu.capability))
    return Target(platform, device.device_kind, getattr(device, "compute_capability", named))


def peak_flops(device: Any, dtype: str) -> float | None:
    """Peak matrix-product FLOP/s of a device in a precision, or None where it is not known.

    GPUs are looked up by name in `cramjax.gpus` (their tensor cores' peak, whatever `dtype` is). A CPU's peaks are
    measured once, on all its cores, and cached.

    Args:
        device: a JAX device.
        dtype: `float32` or `bfloat16`.
    """
    if device.platform == "cpu":
        return _cpu_peaks()[dtype] / len(jax.local_devices(backend="cpu"))
    gpu = gpu_of_kind(device.device_kind)
    return None if gpu is None else gpu.tensor_flops


def fast_bfloat16() -> bool:
    """Whether products of bfloat16 are what to train with on the device that is traced for.

    So they are on GPUs and TPUs, and on CPUs that have instructions for them: where they run at 1.3 times the speed of
    float32 or more, which pays for rounding back and forth.
    """
    if target().platform != "cpu":
        return True
    peaks = _cpu_peaks()
    return peaks["bfloat16"] > 1.3 * peaks["float32"]


def describe(device: Any) -> str:
    """Name of a device as a reader knows it, such as `NVIDIA GeForce RTX 4090` or `AMD EPYC, 2 cores`: of a CPU with
    the cores that this process may use.
    """
    if device.platform == "cpu":
        return f"{_cpu_name()}, {usable_cores():g} cores"
    return device.device_kind


def memory_bytes(device: Any) -> int:
    """Bytes in use at the peak so far: of the device, or of this process on a CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats:
        return int(stats["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, instead of giving it back to the system and asking for it again.

    XLA's CPU backend allocates the intermediate values of a step anew at every step. By default glibc returns blocks of
    that size to the system at once, and every page that is written again is a page fault: two fifths of a small
    model's step. It is set for the whole process, which keeps its peak of memory till its end. Call it before the
    first computation: threads that have allocated already keep their ways. C libraries other than glibc are left as
    they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return
    for option, value in _MALLOC_OPTIONS.items():
        mallopt(option, value)


def return_freed_memory() -> None:
    """Give what has been freed back to the operating system, where the C library can: after passing needs are over."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or another system
        ctypes.CDLL(None).malloc_trim(0)


def memory_limit(device: Any) -> int:
    """Bytes that a GPU lets this process have, or the memory of the computer for a CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return int(stats["bytes_limit"]) if stats else psutil.virtual_memory().total


def cpu_bandwidth() -> float:
    """Bytes per second that this CPU reads and writes in passes over large arrays, measured once and cached."""
    return _cpu_peaks()["bandwidth"]


def usable_cores() -> float:
    """Cores that this process may use: by its affinity, and by the quotas of its control groups, which may be parts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *_quotas(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def _quotas(root: Path, own: Path) -> Iterator[float]:
    """Cores that the control groups of this process allow, of version 2 or 1, from its own group to the root.

    Args:
        root: where control groups are mounted.
        own: the file that names this process's.
    """
    for line in _text_of(own).splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = root / ("cpu" if controllers else "") / name.strip("/")
        while group.is_relative_to(root):
            words = _text_of(group / "cpu.max").split()
            words = words or [_text_of(group / f"cpu.cfs_{each}_us").strip() for each in ("quota", "period")]
            if len(words) == 2 and all(word.isdigit() for word in words):  # else "max", -1 or nothing
                yield int(words[0]) / int(words[1])
            group = group.parent


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


@functools.cache
def _cpu_peaks() -> dict[str, float]:
    path = cache_directory() / "cpu_peaks.json"
    name = describe(jax.local_devices(backend="cpu")[0])
    try:
        known: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
        figures = dict(known.get(name, {}))
    except (OSError, ValueError, AttributeError, TypeError):  # none, or damaged
        known, figures = {}, {}
    measures: dict[str, Callable[[], _Measured]] = {
        "float32": lambda: _measure_cpu_peak("float32"),
        "bfloat16": lambda: _measure_cpu_peak("bfloat16"),
        "bandwidth": _measure_cpu_bandwidth,
    }
    measured = {figure: measure() for figure, measure in measures.items() if figure not in figures}
    if kept := {figure: each.rate for figure, each in measured.items() if each.alone}:
        write_atomically(path, json.dumps(known | {name: figures | kept}, indent=1))
    return figures | {figure: each.rate for figure, each in measured.items()}


class _Measured(NamedTuple):
    """How fast this CPU did something."""

    rate: float
    """Per second."""
    alone: bool
    """Whether no other process was in the way: else it is the best that is known now, and not kept."""


def _measure_cpu_bandwidth(size: int = 32 << 20, repeats: int = 6) -> _Measured:
    """Bytes per second of the fastest of several passes that read one array and write another."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        a = jnp.ones(size, jnp.float32)
        add = jax.jit(lambda a: a + 1)
        return _fastest(2 * a.nbytes, lambda: add(a), repeats)


def _measure_cpu_peak(dtype: str, size: int = 1536, repeats: int = 6) -> _Measured:
    """FLOP/s of the fastest of several square products, summed in float32."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        a = jnp.ones((size, size), dtype)
        product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
        return _fastest(2 * size**3, lambda: product(a), repeats)


def _fastest(work: float, compute: Callable[[], jax.Array], repeats: int) -> _Measured:
    """The rate of the fastest of several calls, after one that compiles; tried again while others are in the way."""
    compute().block_until_ready()
    fastest = math.inf
    for _ in range(_ATTEMPTS):

        def repeated() -> float:
            seconds = math.inf
            for _ in range(repeats):
                start = time.perf_counter()
                compute().block_until_ready()
                seconds = min(seconds, time.perf_counter() - start)
            return seconds

        seconds, alone = undisturbed(repeated)
        fastest = min(fastest, seconds)
        if alone:
            return _Measured(work / fastest, alone=True)
    return _Measured(work / fastest, alone=False)


def undisturbed(work: Callable[[], _R]) -> tuple[_R, bool]:
    """What some work gives, and whether no other process was in its way: else what it timed is worth little.

    Args:
        work: which takes a good part of a second at least.
    """
    began, busy, own = time.perf_counter(), _busy_seconds(), time.process_time()
    made = work()
    own, wall = time.process_time() - own, time.perf_counter() - began
    return made, not _in_the_way(own, _busy_seconds() - busy - own, wall * usable_cores())


def _in_the_way(own: float, others: float, there: float) -> bool:
    """Whether this process got too little of its cores, and others are why: seconds of cores, used and there.

    A computation that leaves some cores idle by itself gets less than all, too.
    """
    return own < _SHARE * there and others > (1 - _SHARE) * there


def _busy_seconds() -> float:
    """Seconds that the cores which this process may use have worked, for whomever."""
    each = psutil.cpu_times(percpu=True)
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(len(each))
    there = [each[core] for core in mine if core < len(each)]
    # A guest's time is the user's, too.
    idle = ("idle", "iowait", "guest", "guest_nice")
    return sum(sum(times) - sum(getattr(times, name, 0.0) for name in idle) for times in there)


def cpu_fingerprint() -> str:
    """A short name of this kind of CPU: of its model and its instruction sets."""
    said = f"{_cpu_info('model name')} {_cpu_info('flags') or _cpu_info('Features')}"
    return f"{platform.machine()}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"


def _cpu_name() -> str:
    return _cpu_info("model name") or "CPU"


def _cpu_info(name: str) -> str:
    """What Linux says of the first CPU; elsewhere nothing."""
    for line in _text_of(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return ""
