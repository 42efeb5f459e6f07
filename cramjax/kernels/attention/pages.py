"""Attention of single queries to keys and values in pages, by a kernel in C++ for CPUs: a token's step.

It reads what each query sees where it is, and no more; XLA gathers, and multiplies with all that there is room for.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cramjax.kernels import native

_SOURCE, _NAME = Path(__file__).with_suffix(".cpp"), "cramjax_attend_pages"


def refusal() -> str | None:
    """Why the kernel cannot run on this machine's CPU, as a clause; None where it can. The first call compiles it."""
    return native.register(_SOURCE, _NAME)


def attend_pages(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "queries kv_heads head_dim"],
    v: Float[Array, "queries kv_heads head_dim"],
    keys: Float[Array, "*stack pages places kv_heads head_dim"],
    values: Float[Array, "*stack pages places kv_heads head_dim"],
    table: Int[Array, "queries held"],
    lengths: Int[Array, " queries"],
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[
    Float[Array, "queries heads head_dim"],
    Float[Array, "*stack pages places kv_heads head_dim"],
    Float[Array, "*stack pages places kv_heads head_dim"],
]:
    """Hold new keys and values, and softmax attention with grouped-query heads, in float32; without a gradient.

    A query is the last of the keys it sees. Several new tokens of a text are queries with tables alike and lengths that
    grow by one.

    Args:
        q: queries.
        k: the key of each, which becomes the last one it sees.
        v: shaped as the keys.
        keys: pages of float32 keys, of a stack numbered through; those of head k serve heads / kv_heads consecutive
            query heads.
        values: shaped as the keys.
        table: the pages of each query's text, in order.
        lengths: keys of each text that its query sees, itself included; 0 gives zeros, and nothing is held.
        window: a query sees so many keys at most, itself included.
        scale: multiplies the scores. Default: 1 / sqrt(head_dim).
        softcap: squashes the scores into ±softcap.

    Returns:
        What the queries give; and keys and values with the new ones, in place where a loop goes on with them: pages
        that XLA itself had changed it would copy first.

    Raises:
        ValueError: pages that are not float32, or heads that do not divide.
    """
    if keys.dtype != jnp.float32 or values.dtype != jnp.float32:
        raise ValueError(f"pages must be float32, got {keys.dtype} and {values.dtype}")
    if q.shape[1] % keys.shape[-2]:
        raise ValueError(f"kv_heads must divide heads, got {keys.shape[-2]} for {q.shape[1]} heads")
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q.shape, keys.shape, values.shape)]
    call = jax.ffi.ffi_call(_NAME, shapes, input_output_aliases={3: 1, 4: 2})
    made, keys, values = call(
        q.astype(jnp.float32),
        k.astype(jnp.float32),
        v.astype(jnp.float32),
        keys,
        values,
        table.astype(jnp.int32),
        lengths.astype(jnp.int32),
        scale=np.float32(q.shape[-1] ** -0.5 if scale is None else scale),
        softcap=np.float32(softcap or 0.0),
        window=np.int64(window or 0),
    )
    return made.astype(q.dtype), keys, values
