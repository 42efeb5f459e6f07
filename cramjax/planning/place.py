"""The device that a plan is for, and how much of its memory a training step may take."""

from dataclasses import dataclass

import jax
import psutil

from cramjax import devices as machine
from cramjax.errors import ConfigError
from cramjax.gpus import GPUS, Gpu, gpu_named, gpu_of_kind
from cramjax.planning.memory import Memory
from cramjax.show.numbers import format_bytes
from cramjax.start import MEMORY_FRACTION, start

CONTEXT_BYTES = 1 << 29
"""What the driver's context, its libraries and loaded programs take of a GPU beside XLA's memory."""
XLA_SHARE = 0.75
"""Of a GPU's memory, about: where XLA's rematerialisation pass begins to recompute."""
CPU_SHARE = 0.8
"""Of a computer's memory that a run on its CPU may use."""


@dataclass(frozen=True)
class Device:
    """What a plan is for."""

    name: str
    gpu: Gpu | None
    """None: this computer's CPU."""
    count: int
    memory: int
    """Bytes of each."""
    usable: int
    """Bytes of each that a step may take."""
    host_memory: int | None = None
    """Bytes of host memory that may be used; None: not known."""

    def holds(self, memory: Memory) -> bool:
        """Whether a step fits the device, and its host."""
        return self.lacks(memory) is None

    def lacks(self, memory: Memory) -> str | None:
        """Why a step does not fit the device and its host; None: it does.

        Activations sent to the host count for the device as well, up to `XLA_SHARE` of it: XLA, which takes them for
        its own, would otherwise recompute more than it is asked to. Where the host's memory is not known, optimizer
        state may be any size, since it does not depend on the microbatch. A CPU is its own host.
        """
        sent = memory.host_by_kind.get("activations", 0) // self.count
        of_device = memory.device_bytes
        if self.gpu is None:  # its host is itself
            of_device += memory.host_bytes // self.count
        if of_device > self.usable:
            return f"{format_bytes(of_device - self.usable)} too much"
        if self.gpu is None:
            return None
        if sent and of_device + sent > XLA_SHARE * self.memory:
            return (
                f"with the {format_bytes(sent)} that wait in host memory it is above {XLA_SHARE:.0%} of the card, from "
                "where on XLA computes more again than it is asked to"
            )
        if self.host_memory is not None and memory.host_bytes > self.host_memory:
            return (
                f"{format_bytes(memory.host_bytes - self.host_memory)} of host memory too much, of which "
                f"{format_bytes(self.host_memory)} may be used here"
            )
        return None

    def __str__(self) -> str:
        many = f"{self.count} × " if self.count > 1 else ""
        return f"{many}{self.name}"


def device_named(name: str | None, count: int = 1) -> Device:
    """The device that a plan is for.

    Of a GPU, XLA takes `cramjax.start.MEMORY_FRACTION`, and the driver's context needs `CONTEXT_BYTES`; of a
    computer's memory, a run on its CPU may use `CPU_SHARE`.

    Args:
        name: a card's name, or `cpu`; None: the device that JAX has here.
        count: how many.

    Raises:
        ConfigError: no such device.
    """
    if name is None:
        return device_here(count)
    if name.lower() == "cpu":
        if count > 1:
            raise ConfigError(f"devices must be 1 for a CPU, which is planned as a whole, got {count}.")
        return _cpu(1)
    gpu = gpu_named(name)
    usable = min(int(MEMORY_FRACTION * gpu.memory), gpu.memory - CONTEXT_BYTES)
    return Device(gpu.name, gpu, count, gpu.memory, usable)


def device_here(count: int = 1) -> Device:
    """The device that JAX has here, with the memory it really gives.

    Raises:
        ConfigError: it is a GPU that the table does not have.
    """
    device = start()[0]
    if device.platform == "cpu":
        return _cpu(count)
    gpu = gpu_of_kind(device.device_kind)
    if gpu is None:
        raise ConfigError(
            f"This {device.device_kind} is not in the table of devices: plan for one like it with "
            f"--device, of {', '.join(GPUS)}; to train, choose batch.microbatch yourself with train.memory=as_given."
        )
    host = int(CPU_SHARE * psutil.virtual_memory().total)
    return Device(device.device_kind, gpu, count, gpu.memory, machine.memory_limit(device), host)


def _cpu(count: int) -> Device:
    """This computer's CPU, or one of the equal parts that JAX sees it as."""
    start()
    device = jax.local_devices(backend="cpu")[0]
    memory = machine.memory_limit(device) // count
    return Device(machine.describe(device), None, count, memory, int(CPU_SHARE * memory))
