"""Products of a few rows with a ternary matrix that stays written in words, by a kernel in C++ for CPUs."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int, Int32, UInt16

from cramjax.kernels import native
from cramjax.kernels.coding.dictionary import dictionary

MOST_ROWS = 8
"""That the kernel multiplies at once."""
_NAME = "cramjax_coded_product"


def refusal() -> str | None:
    """Why the kernel cannot run on this machine's CPU, as a clause; None where it can. The first call compiles it."""
    return native.register(Path(__file__).with_suffix(".cpp"), _NAME)


def coded_product(
    x: Float[Array, "rows inner"],
    words: UInt16[Array, "matrices words"],
    starts: Int32[Array, "matrices starts"],
    levels: BFloat16[Array, "matrices 2 outer"],
    which: Int[Array, ""] | int = 0,
) -> Float[Array, "rows outer"]:
    """Multiply at most eight rows with a matrix of a stack, in float32. It has no gradient.

    Args:
        x: rows (rows, inner), in any precision.
        words: of each matrix, its columns one after the other; what is past the last is not read.
        starts: where each column begins, and the last one ends (matrices, outer + 1).
        levels: what the values 1 and 2 of a column stand for.
        which: which matrix; may be traced.

    Raises:
        ValueError: more rows.
    """
    if not 1 <= len(x) <= MOST_ROWS:
        raise ValueError(f"x must have 1 to {MOST_ROWS} rows, got {len(x)}")
    call = jax.ffi.ffi_call(_NAME, jax.ShapeDtypeStruct((len(x), levels.shape[-1]), jnp.float32))
    return call(x.astype(jnp.float32), words, starts, levels, _table(), jnp.asarray(which, jnp.int32))


@cache
def _table() -> np.ndarray:
    return dictionary().table
