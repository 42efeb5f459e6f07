"""What is to be known of devices: peak speeds (the denominator of utilisation), names, and how a CPU keeps memory."""

import ctypes
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from cramjax.cache import cache_directory, write_atomically

# Dense bf16 tensor-core FLOP/s (fp16 for cards without bf16) from the vendors' data sheets; first match wins.
_PEAKS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 6000 Ada", 364e12),
    ("RTX A6000", 155e12),
    ("RTX A5000", 111e12),
    ("RTX A4000", 77e12),
    ("RTX 5090", 210e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("RTX 2080 Ti", 54e12),
    ("V100", 125e12),
    ("T4", 65e12),
)


# glibc's malloc.h: M_TRIM_THRESHOLD (never shrink the heap), M_MMAP_MAX (no block outside it), M_ARENA_MAX (one heap).
_MALLOC_OPTIONS = {-1: 2**31 - 1, -4: 0, -8: 1}


def peak_flops(device: Any) -> float | None:
    """Peak matrix-product FLOP/s of a device, or None where it is not known.

    GPUs are looked up by name (bf16, dense). A CPU's peak is measured once, with f32 products on all its cores, and
    cached.
    """
    if device.platform == "cpu":
        return _cpu_peak() / len(jax.local_devices(backend="cpu"))
    return next((peak for name, peak in _PEAKS if name in device.device_kind), None)


def describe(device: Any) -> str:
    """Name of a device as a reader knows it, such as `NVIDIA GeForce RTX 4090` or `AMD EPYC, 2 cores`."""
    if device.platform == "cpu":
        return f"{_cpu_name()}, {psutil.cpu_count()} cores"
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


def _cpu_peak() -> float:
    path = cache_directory() / "cpu_peak.json"
    name = describe(jax.local_devices(backend="cpu")[0])
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
        known[name] = _measure_cpu_peak()
        write_atomically(path, json.dumps(known, indent=1))
    return known[name]


def _measure_cpu_peak(size: int = 1536, repeats: int = 8) -> float:
    """FLOP/s of the fastest of several square f32 products."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        a = jnp.ones((size, size), jnp.float32)
        product = jax.jit(jnp.matmul)
        product(a, a).block_until_ready()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            product(a, a).block_until_ready()
            times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "CPU"
