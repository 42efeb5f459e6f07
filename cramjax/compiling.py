"""XLA's options, chosen for each program that is compiled: by the device it runs on and by the time it will run.

They are given to the program (`jax.jit(compiler_options=…)`) and not to the process: an unknown flag in `XLA_FLAGS`
ends the process, and one set there holds for everything. What a user sets in `XLA_FLAGS` is left as it is.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jaxlib.version

from cramjax.budget import Budget
from cramjax.cache import cache_directory, prune
from cramjax.devices import Target, cpu_fingerprint, target, target_of

Options = dict[str, bool | int | str]

_R = TypeVar("_R")

BRIEF = 60.0
"""Seconds that stand for a program which someone is waiting for, such as a generation."""

CACHE_BYTES = 4 << 30
"""What compiled programs and tuning results may take of the disk."""

_TUNING_PAYS = 600.0
"""Seconds of running from which on products are tuned. With tuning, steps of 124M to 7B parameters took 14 to 47 s to
compile on an H100: under a tenth of ten minutes."""

# XLA recomputes what a program keeps beyond this percentage of four fifths of a card's memory, 95 by default: so much
# that what fits the card (`cramjax.start.MEMORY_FRACTION` of its memory) is kept.
_MEMORY_PERCENT = 118


def compiler_options(target: Target, *, seconds: float | None = None) -> Options:
    """XLA's options for a program.

    Which operations become CUDA graphs is left to XLA: a small model's whole step is one graph as far as it has no
    loop. The loop over microbatches, and that over scanned layers, is launched by the host, an iteration at a time.

    Args:
        target: the device that it is compiled for.
        seconds: how long it will run, all calls together; None: long, or not known.

    Returns:
        Names and values as `jax.jit(compiler_options=…)` takes them; jax 0.10.2 and 0.12 know all of them.
    """
    if target.platform != "gpu":
        return {}
    # Products of one input stay apart: XLA would merge those below 64 MB, then cut and copy the result (DotMerger).
    options: Options = {"xla_gpu_dot_merger_threshold_mb": 0, "xla_gpu_memory_limit_slop_factor": _MEMORY_PERCENT}
    if target.ahead_of_time:
        # What XLA chooses where it can measure: cuBLAS for products. Ahead of time it has nothing to measure on.
        return options | {"xla_gpu_enable_triton_gemm": False}
    if seconds is not None and seconds < _TUNING_PAYS:
        options |= {
            "xla_gpu_autotune_level": 0,  # no product is timed: cuBLAS's heuristic chooses, as it does for PyTorch
            "xla_gpu_enable_triton_gemm": False,  # Triton's tiles are only as good as their tuning
            # Compiles each fusion twice, to time both: over 100 s for one program (zea, issue 599).
            "xla_gpu_experimental_enable_fusion_autotuner": False,
        }
    return options


def device_options(device: Any, budget: str) -> Options:
    """Options of a program of a run, but for those that `XLA_FLAGS` sets.

    Args:
        device: the JAX device that it is for.
        budget: of the run, as `Budget.parse` understands it; what is not a time is taken for a long one.
    """
    return _left_to_choose(target_of(device), time_budget(budget))


def time_budget(budget: str) -> float | None:
    """Seconds of a budget, as `Budget.parse` understands it; None where it is not a time."""
    parsed = Budget.parse(budget)
    return parsed.amount if parsed.unit == "seconds" else None


def jit(function: Callable[..., _R], *, seconds: float | None = None, **options: Any) -> Callable[..., _R]:
    """`jax.jit` with the options of the device that is there at the first call.

    Args:
        function: what to compile.
        seconds: as for `compiler_options`.
        options: of `jax.jit`.
    """

    @functools.cache
    def jitted() -> Callable[..., _R]:
        return jax.jit(function, compiler_options=_left_to_choose(target(), seconds), **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> _R:
        return jitted()(*args, **kwargs)

    return call


def keep_programs(configured: str | None = None) -> None:
    """Keep compiled programs, and what XLA found when it tuned them, for the next start; as long as they are used.

    They lie in the cache directory, apart for each kind of CPU and version of jaxlib: a CPU's programs are made for its
    instructions. What was longest not read is deleted, when it is more than `CACHE_BYTES` in all; JAX's own bound
    leaves XLA's files out, and does not survive files of processes that died (jax 0.10.2). A directory that the user
    has given to JAX is left to the user.

    Args:
        configured: as for `cache_directory`.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    directory = cache_directory(configured) / "xla"
    prune(directory, CACHE_BYTES)
    own = directory / f"{cpu_fingerprint()}-jaxlib-{jaxlib.version.__version__}"
    jax.config.update("jax_compilation_cache_dir", str(own))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _left_to_choose(target: Target, seconds: float | None) -> Options:
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        name: value for name, value in compiler_options(target, seconds=seconds).items() if f"--{name}" not in flags
    }
