"""What the row kernels share: GPU kernels, in Pallas through its Triton lowering, that read each row once.

XLA splits a norm into a reduction and a pass, and computes what several readers share once, in float32, in memory.
These kernels read and write the compute precision and keep the rest on the chip.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from cramjax import devices
from cramjax.kernels.choice import nothing_in
from cramjax.kernels.triton import missing, triton, triton_call

_NUMBERS = 4096
"""Numbers of an array that a program holds at once: some 32 for each of its threads."""
MOST_BLOCKS = 65535
"""Of a grid's second and third axis, by CUDA."""
_WIDEST = 16384
"""Columns above which a row does not fit a program's registers."""


def refusal(x: Array, width: int) -> str | None:
    """Why a row kernel cannot run on the device that is traced for; None when it can.

    Args:
        x: what it reads.
        width: columns that it holds at once.
    """
    if reason := refusal_here():
        return reason
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"its kernels are for float32, bfloat16 and float16, not {x.dtype}"
    if width > _WIDEST:
        return f"its rows have at most {_WIDEST} columns, not {width}"
    return nothing_in(x.shape)


def refusal_here() -> str | None:
    """Why no row kernel can run on the device that is traced for; None when they can."""
    target = devices.target()
    if reason := missing():
        return reason
    if target.platform != "gpu":
        return f"its kernels are for NVIDIA GPUs and this is a {target.platform}"
    if not target.at_least(8.0):
        return f"it needs compute capability 8.0, and {target.kind} has {target.capability}"
    return None


def call(
    kernel: Callable[..., None], *, name: str, interpret: bool, numbers: int = _NUMBERS, **arguments: Any
) -> Callable[..., Any]:
    """A row kernel whose programs hold so many numbers of an array at once; arguments as of `triton_call`."""
    warps = min(16, max(4, numbers // 1024))  # 32 numbers a thread, 64 of the widest rows
    return triton_call(kernel, name=name, interpret=interpret, warps=warps, stages=1, **arguments)


def load(ref: Any, mask: Array, *places: Any) -> Array:
    """Read part of a block in float32; 0 where the mask is False."""
    part = ref.at[places] if places else ref
    return triton.load(part, mask=mask, other=0).astype(jnp.float32)


def store(ref: Any, value: Array, mask: Array, *places: Any) -> None:
    """Write part of a block in its precision, where the mask is True."""
    part = ref.at[places] if places else ref
    triton.store(part, value.astype(ref.dtype), mask=mask)


def rows_at_once(width: int) -> int:
    """Rows of a padded width that a program holds at once: a power of two."""
    return max(1, _NUMBERS // width)


@functools.cache
def power_of_two(size: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (size - 1).bit_length()
