"""Products of rows with a matrix, by a kernel in C++ that reads the matrix at the speed of memory, in the form it
is kept in.

XLA's programs for CPUs read float32 so, for one row; bfloat16 and integers at a tenth of it.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from cramjax.kernels import native

MOST_ROWS = 8
"""That the kernel multiplies at once; of more, it reads a chunk of columns again for the next eight."""
SOURCE = Path(__file__).with_suffix(".cpp")
_NAME = "cramjax_few_rows"


def refusal() -> str | None:
    """Why the kernel cannot run on this machine's CPU, as a clause; None where it can. The first call compiles it."""
    return native.register(SOURCE, _NAME)


def few_rows(
    x: Float[Array, "rows inner"],
    w: Num[Array, "*layer kept outer"],
    layer: Int[Array, ""] | int = 0,
    *,
    scale: Float[Array, "*layer groups outer"] | None = None,
    zero: Float[Array, "*layer groups outer"] | None = None,
    rounds: bool = False,
) -> Float[Array, "rows outer"]:
    """Multiply rows with a matrix, in float32. It has no gradient.

    A stack is not cut: the kernel is given all of it, and reads one matrix.

    Args:
        x: rows (rows, inner), in any precision.
        w: a matrix (inner, outer), or a stack of them: float32, bfloat16 or its bits as uint16, int8, or uint8
            (inner / 2, outer), each of two codes as `Quantised` keeps them.
        layer: which matrix of a stack; may be traced.
        scale: of codes: what a group of a column's is multiplied with, float32 (groups, outer).
        zero: the code of 0, like `scale`. Default: 0.
        rounds: round the rows to 8 bits too, each with a step of its own for every group of inputs, and sum whole
            numbers; only with scales, and groups of a multiple of four.

    Raises:
        ValueError: shapes that do not fit together, or a kind of weight that there is none of.
    """
    rows, inner = x.shape
    kept, outer = w.shape[-2:]
    pairs = w.dtype == jnp.uint8
    if w.dtype not in (jnp.float32, jnp.bfloat16, jnp.uint16, jnp.int8, jnp.uint8) or w.ndim not in (2, 3):
        raise ValueError(f"w must be float32, bfloat16, int8 or uint8 of 2 or 3 axes, got {w.dtype} {w.shape}")
    if inner != kept * (2 if pairs else 1):
        raise ValueError(f"x of shape {x.shape} does not fit w of shape {w.shape}")
    if scale is None:
        if pairs or zero is not None or rounds:
            raise ValueError("codes of 4 bits, zeros, and rows that are rounded need scales")
    else:
        groups = scale.shape[-2]
        if scale.shape != (*w.shape[:-2], groups, outer) or inner % groups or (pairs and (inner // groups) % 2):
            raise ValueError(f"scale of shape {scale.shape} does not divide w of shape {w.shape} into groups")
        if rounds and inner // groups % 4:
            raise ValueError(f"rows are rounded in groups of a multiple of 4 inputs, got {inner // groups}")
        if zero is not None and zero.shape != scale.shape:
            raise ValueError(f"zero must have the shape of scale {scale.shape}, got {zero.shape}")
    none = jnp.zeros(0, jnp.float32)
    call = jax.ffi.ffi_call(_NAME, jax.ShapeDtypeStruct((rows, outer), jnp.float32))
    return call(
        x.astype(jnp.float32),
        w,
        jnp.asarray(layer, jnp.int32),
        none if scale is None else scale.astype(jnp.float32),
        none if zero is None else zero.astype(jnp.float32),
        rounds=rounds,
    )
