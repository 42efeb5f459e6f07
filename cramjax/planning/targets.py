"""Compiling ahead of time for GPUs that are not there: what fits, and what it takes, without running anything.

XLA compiles for a description of a card. It needs JAX's CUDA plugin (the same version as jax) and `ptxas`; neither
needs a driver.
"""

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from cramjax import devices as machine
from cramjax.compiling import compiler_options
from cramjax.errors import ConfigError
from cramjax.gpus import Gpu, gpu_named
from cramjax.notices import without_cuda_notices
from cramjax.start import start

# jax 0.12 finds the compute capability of an abstract device by its name, and has few of them.
_STAND_INS = {(8, 6): "NVIDIA A10", (8, 9): "NVIDIA L40", (12, 0): "NVIDIA RTX PRO 6000"}


@dataclass(frozen=True)
class Compiled:
    """A program for a GPU, or for one of several that run it together."""

    gpu: Gpu | None
    """None: the device there is."""
    arguments: int
    """Bytes of its inputs."""
    outputs: int
    """Bytes of its outputs."""
    aliases: int
    """Bytes of outputs that lie where donated inputs lay."""
    temporaries: int
    """Bytes of everything in between."""
    text: str
    """The optimised HLO."""
    flops: float | None = None
    """Operations that the compiler counts in all of it, of loops and branches each body once; None: it does not say."""
    bytes_accessed: float | None = None
    """Bytes that its operations read and write, by the same count."""
    host: int = 0
    """Bytes of host memory that the program takes and its outputs stay in, of a whole step those of all devices; not
    among the device's."""

    @property
    def device_bytes(self) -> int:
        """Device memory that running it takes."""
        return self.arguments + self.outputs - self.aliases + self.temporaries


def missing() -> str | None:
    """Why nothing can be compiled for a GPU on this machine; None when it can."""
    for module in ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{module} is not installed"
    return None


def compile_for(
    target: str,
    function: Callable[..., Any],
    *arguments: Any,
    donate: tuple[int, ...] = (),
    mesh: Mesh | None = None,
    out_shardings: Any = None,
) -> Compiled:
    """Compile a function for a GPU, or for several of a kind that work as one.

    Args:
        target: a card, as `cramjax.gpus.gpu_named` understands it.
        function: what to compile.
        arguments: its arguments: pytrees of arrays or `jax.ShapeDtypeStruct`. Those sharded over `mesh` stay so; the
            others are whole on every device.
        donate: numbers of the arguments whose memory the outputs may take.
        mesh: of `devices_of(target, count)`. Default: one card.
        out_shardings: of what the function returns, as `jax.jit` takes them. Default: the compiler's choice.

    Raises:
        ConfigError: the target is not known, or the packages that compile for it are not installed.
        JaxRuntimeError: the program cannot run on the card, such as one whose kernels need more shared memory.
    """
    gpu = gpu_named(target)
    _require_compiler()
    whole = NamedSharding(mesh or Mesh(np.asarray(devices_of(target)), ("data",)), jax.P())

    def place(x: Any) -> jax.ShapeDtypeStruct:
        placed = isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None
        return x if placed else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    abstract = jax.tree.map(place, arguments)
    with tracing_for(gpu), _without_keeping_programs():
        options = compiler_options(replace(machine.target(), ahead_of_time=True))  # also if this very card is here
        jitted = jax.jit(function, donate_argnums=donate, out_shardings=out_shardings, compiler_options=options)
        compiled = jitted.lower(*abstract).compile()
    return compiled_of(gpu, compiled)


def compiled_of(gpu: Gpu | None, compiled: Any) -> Compiled:
    """The sizes and the text of what JAX has compiled.

    Args:
        gpu: what it was compiled for; None: the device there is.
        compiled: a `jax.stages.Compiled`.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    counted = compiled.cost_analysis() or {}
    assert memory is not None and text is not None, "XLA's compilers for GPUs and CPUs give both"
    return Compiled(
        gpu=gpu,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliases=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        text=text,
        flops=counted.get("flops"),
        bytes_accessed=counted.get("bytes accessed"),
        host=memory.host_argument_size_in_bytes
        + memory.host_output_size_in_bytes
        - memory.host_alias_size_in_bytes
        + memory.host_temp_size_in_bytes,
    )


def tracing_for(gpu: Gpu) -> Any:
    """A context in which functions are traced as if for a card: `cramjax.devices.target` reads it."""
    device = jax.sharding.AbstractDevice(_kind(gpu), gpu.cores, "gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _kind(gpu: Gpu) -> str:
    """The name that JAX is told, of abstract devices and of those to compile for: they must agree on a mesh."""
    return f"{gpu.name} (as {_STAND_INS[gpu.capability]})" if gpu.capability in _STAND_INS else gpu.name


@contextlib.contextmanager
def _without_keeping_programs() -> Iterator[None]:
    """JAX's compilation cache would keep a program that it cannot load without the GPU."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


@functools.cache
def devices_of(target: str, count: int = 1) -> tuple[Any, ...]:
    """Cards of one host to compile for, as devices that a mesh can be made of.

    Args:
        target: a key of `GPUS`.
        count: how many.

    Raises:
        ConfigError: the target is not known, or the packages that compile for it are not installed.
    """
    description = _description(gpu_named(target))
    _require_compiler()
    start()
    try:
        with without_cuda_notices():
            topology = topologies.get_topology_desc(platform="cuda", target_config=description, topology=f"1x1x{count}")
    except NotImplementedError:  # JAX leaves its plugin out where it finds no CUDA libraries and was not told to
        raise ConfigError(
            "Nothing can be compiled for a GPU here: JAX looked for a GPU when it started, and found no CUDA. Set "
            "JAX_PLATFORMS=cpu in the environment, before jax is first used."
        ) from None
    return tuple(topology.devices)


def _require_compiler() -> None:
    if reason := missing():
        raise ConfigError(f'Nothing can be compiled for a GPU here: {reason}. Install with pip install "cramjax[aot]".')


def _description(gpu: Gpu) -> str:
    """A card as XLA's `GpuTargetConfigProto`, in text."""
    major, minor = gpu.capability
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {gpu.cores}
          fpus_per_core: {gpu.lanes}
          threads_per_core_limit: {gpu.threads}
          threads_per_block_limit: 1024
          threads_per_warp: 32
          thread_dim_limit_x: 1024
          thread_dim_limit_y: 1024
          thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          shared_memory_per_core: {gpu.shared_memory}
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {gpu.shared_memory - 1024}
          l2_cache_size: {gpu.l2_cache}
          device_memory_size: {gpu.memory}
          memory_bandwidth: {int(gpu.bandwidth)}
          clock_rate_ghz: {gpu.clock / 1e9}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{_kind(gpu)}"
    """
