"""Pallas through its Triton lowering, which is deprecated since jax 0.11: where it is gone, its kernels refuse."""

import math
from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton: Any = None

LOG2E = math.log2(math.e)
"""Kernels take powers of 2, which the hardware has, instead of e."""


def missing() -> str | None:
    """Why no kernel can be lowered so; None where it can."""
    return "this jax has no Triton lowering of Pallas" if triton is None else None


def triton_call(
    kernel: Callable[..., None], *, name: str, interpret: bool, warps: int, stages: int, **arguments: Any
) -> Callable[..., Any]:
    """`pallas_call` with explicit parameters: without them, jax's versions lower to different backends.

    Args:
        kernel: the body.
        name: of the kernel, in programs and profiles.
        interpret: run it as plain operations, on any device.
        warps: of 32 threads, that share a program's work.
        stages: iterations of an inner loop whose loads are in flight together.
        arguments: of `pallas_call`.
    """
    parameters = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(kernel, compiler_params=parameters, interpret=interpret, name=name, **arguments)
