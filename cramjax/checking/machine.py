"""The machine: its devices, the versions of what drives them, and the speeds that a program cannot exceed."""

import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from cramjax import devices
from cramjax.checking.kernels import in_turns
from cramjax.gpus import gpu_of_kind

_PACKAGES = ("cramjax", "jax", "jaxlib", "flax", "optax", "numpy")
_CUDA_PACKAGES = ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


@dataclass(frozen=True)
class Machine:
    """What there is to compute with."""

    device: str
    """Name of the first device."""
    platform: str
    """`cpu`, `gpu` or `tpu`."""
    capability: str | None
    """CUDA compute capability of the first device."""
    count: int
    """Devices that JAX sees."""
    memory: int
    """Bytes of the first device that this process may have."""
    sheet_memory: int | None
    """Bytes of the card by its data sheet; None where the table of cards does not have it."""
    host_cores: int
    host_memory: int
    """Bytes."""
    versions: Mapping[str, str]
    """Of Python, the packages, and the driver."""


def this_machine() -> Machine:
    """The machine that this runs on."""
    device, target = jax.devices()[0], devices.target()
    gpu = gpu_of_kind(device.device_kind)
    return Machine(
        device=devices.describe(device),
        platform=target.platform,
        capability=target.capability,
        count=jax.device_count(),
        memory=devices.memory_limit(device),
        sheet_memory=None if gpu is None else gpu.memory,
        host_cores=psutil.cpu_count() or 1,
        host_memory=psutil.virtual_memory().total,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *_CUDA_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists() and (number := re.search(r"\b\d{3}\.\d+(\.\d+)?\b", driver.read_text(encoding="utf-8"))):
        found["NVIDIA driver"] = number[0]
    return found


@dataclass(frozen=True)
class Ceiling:
    """A speed that no program exceeds on this machine."""

    name: str
    unit: str
    """`FLOP/s` or `B/s`."""
    measured: float
    sheet: float | None
    """By the data sheet; None where it says nothing of it, or is not known."""


def ceilings(quick: bool) -> list[Ceiling]:
    """Measure square products, copies in memory, and on accelerators the bus to the host.

    Args:
        quick: whether small arrays will do, which reach less.
    """
    device = jax.devices()[0]
    gpu = gpu_of_kind(device.device_kind)
    small = quick or device.platform == "cpu"
    size, bytes_moved = (1024, 64 << 20) if small else (8192, 1 << 30)
    found = [
        Ceiling("bfloat16 products", "FLOP/s", product_flops("bfloat16", size), gpu and gpu.peak_flops("bfloat16")),
        # As they are unless more is asked for: of TF32 on GPUs that have it, of which the table has no figures.
        Ceiling("float32 products", "FLOP/s", product_flops("float32", size), None),
        Ceiling("memory", "B/s", copy_bandwidth(bytes_moved), gpu and gpu.bandwidth),
    ]
    if device.platform != "cpu":
        to_device, to_host = bus_bandwidths(bytes_moved)
        found += [
            Ceiling("host to device", "B/s", to_device, gpu and gpu.host_bandwidth),
            Ceiling("device to host", "B/s", to_host, gpu and gpu.host_bandwidth),
        ]
        exact = product_flops("float32", size // 2, precision="highest")
        found.insert(2, Ceiling("float32 products, exact", "FLOP/s", exact, gpu and gpu.float32_flops))
    return found


def product_flops(dtype: str, size: int, precision: str | None = None) -> float:
    """FLOP/s of products of two square matrices, given in their precision, or on CPUs in float32: as the model's are.

    Args:
        dtype: of the operands.
        size: of the matrices' sides.
        precision: of products, as of `jax.default_matmul_precision`. Default: the device's own.
    """
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    given = "float32" if devices.target().platform == "cpu" else dtype
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision, preferred_element_type=given))
    return 2 * size**3 / _seconds(lambda: product(a, a))


def copy_bandwidth(size: int) -> float:
    """Bytes per second, read and written, of passes that read one array and write another.

    Args:
        size: of the array, in bytes.
    """
    a = jnp.ones(size // 4, jnp.float32)
    add = jax.jit(lambda a: a + 1)
    return 2 * size / _seconds(lambda: add(a))


def bus_bandwidths(size: int) -> tuple[float, float]:
    """Bytes per second from pinned host memory to the device, and back.

    Args:
        size: of the array, in bytes.
    """
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    pinned = place.with_memory_kind("pinned_host")
    there = jax.device_put(jnp.ones(size // 4, jnp.float32), place)
    here = jax.device_put(there, pinned)
    return size / _seconds(lambda: jax.device_put(here, place)), size / _seconds(lambda: jax.device_put(there, pinned))


def _seconds(call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    return in_turns({"": call}, seconds=0.2)[""]
