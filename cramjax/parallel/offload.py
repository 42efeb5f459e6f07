"""Host memory beside a mesh of accelerators: where optimizer state lives, and how arrays cross the bus.

Inside a program for the accelerator, arrays leave through the memory kind `pinned_host`, which a loop can write block
by block. What is computed on the host is a program of JAX's CPU backend, on one CPU device for each accelerator. It is
not host compute inside the accelerator's program (`compute_on`): that compiles for CUDA (jax 0.10.2), but XLA merges
all its calls into one, which waits for the last gradient; holds every result twice in host memory, since a host call
cannot write where it reads; and, if a loop slices stacked host arrays for it, copies each slice of the float32 state to
the device and back. Programs of the CPU backend update in place, use all cores, and run while the accelerator does.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from cramjax.errors import RunError

PINNED = "pinned_host"


def host_mesh(mesh: Mesh) -> Mesh:
    """The mesh of the CPU devices that stand beside a mesh of accelerators, one for each, with the same axes.

    On a mesh of CPU devices it is that mesh.

    Raises:
        RunError: a device has no `pinned_host` memory, or there are not enough CPU devices.
    """
    first = mesh.devices.flat[0]
    kinds = sorted(memory.kind for memory in first.addressable_memories())
    if PINNED not in kinds:
        raise RunError(
            f"train.offload_optimizer needs devices with {PINNED} memory, and {first.device_kind} has "
            f"{', '.join(kinds) or 'none that JAX knows'}: set train.offload_optimizer=false."
        )
    if first.platform == "cpu":
        return mesh
    try:
        cpus = jax.local_devices(backend="cpu")
    except RuntimeError as error:
        raise RunError(
            f"train.offload_optimizer updates weights on JAX's CPU backend, which is not there ({error}): leave "
            f"JAX_PLATFORMS unset, or set it to {first.platform},cpu."
        ) from error
    if len(cpus) < mesh.size:
        raise RunError(
            f"train.offload_optimizer needs a CPU device for each of {mesh.size} accelerators, and there are "
            f"{len(cpus)}: set JAX_NUM_CPU_DEVICES={mesh.size} in the environment."
        )
    return Mesh(np.asarray(cpus[: mesh.size]).reshape(mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types)


def over(mesh: Mesh, shardings: PyTree) -> PyTree:
    """The same division of arrays over another mesh."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s.spec), shardings)


def pinned(shardings: PyTree) -> PyTree:
    """The same division of arrays, in host memory that the devices can write."""
    return jax.tree.map(lambda s: s.with_memory_kind(PINNED), shardings)


def host_buffer(shape: tuple[int, ...], dtype: Any) -> Array:
    """Uninitialised pinned host memory, in a program for the accelerator."""
    return to_host(jax.lax.empty(shape, dtype))


def to_host(x: Array) -> Array:
    """Send a value to pinned host memory, in a program for the accelerator."""
    return jax.device_put(x, jax.memory.Space.Host)


def move(tree: PyTree, shardings: PyTree) -> PyTree:
    """Copy arrays to the devices of another mesh, each shard to the device in its place; does not wait for them.

    Args:
        tree: arrays, on one mesh.
        shardings: the same division of each over the other mesh.
    """

    def shards(x: Array, sharding: NamedSharding) -> Array:
        mine = {shard.device: shard.data for shard in x.addressable_shards}
        pairs = zip(x.sharding.mesh.devices.flat, sharding.mesh.devices.flat, strict=True)  # pyright: ignore
        placed = [
            jax.device_put(mine[source], jax.sharding.SingleDeviceSharding(target, memory_kind=sharding.memory_kind))
            for source, target in pairs
        ]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, placed)

    return jax.tree.map(shards, tree, shardings)
