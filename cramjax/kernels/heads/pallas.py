"""Norm and rotation of heads for NVIDIA GPUs: one kernel each way, which takes queries and keys apart as it goes.

A program holds one head of some tokens, in halves. The backward kernel computes the norm's one number a row again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from cramjax.kernels import rows
from cramjax.kernels.mesh import by_token

Rotary = tuple[Array, Array] | None


def normalise_and_rotate(
    queries: int,
    eps: float | None,
    x: Float[Array, "batch seq all_heads head_dim"],
    rotary: tuple[Float[Array, "rows seq 1 half"], Float[Array, "rows seq 1 half"]] | None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "batch seq heads head_dim"], Float[Array, "batch seq kv_heads head_dim"]]:
    """Queries and keys.

    Args:
        queries: heads of queries.
        eps: added to the mean square; None: no norm.
        x: heads of queries, then of keys.
        rotary: cosines and sines; None: no rotation.
        interpret: run the kernels as plain operations, on any device.
    """
    both: Any = _apply((queries, eps, interpret), x, rotary)
    return both


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(static: tuple[int, float | None, bool], x: Array, rotary: Rotary) -> tuple[Array, Array]:
    queries, eps, interpret = static

    def apply(shared: Rotary, tokens: tuple[Array, Rotary]) -> tuple[tuple[()], tuple[Array, Array]]:
        x, own = tokens
        return (), _call_forward(queries, eps, interpret, x, shared or own)

    return by_token(apply, *_shared(rotary, x))[1]


def _forward(static: Any, x: Array, rotary: Rotary) -> tuple[tuple[Array, Array], tuple[Array | None, Rotary]]:
    return _apply(static, x, rotary), (None if static[1] is None else x, rotary)


def _backward(static: Any, residuals: tuple[Array | None, Rotary], gs: tuple[Array, Array]) -> tuple[Array, Any]:
    _, eps, interpret = static
    x, rotary = residuals

    def differentiate(shared: Rotary, tokens: tuple[Any, Rotary]) -> tuple[tuple[()], Array]:
        (x, g_queries, g_keys), own = tokens
        return (), _call_backward(eps, interpret, x, g_queries, g_keys, shared or own)

    by_x = by_token(differentiate, *_shared(rotary, (x, *gs)))[1]
    return by_x, jax.tree.map(jnp.zeros_like, rotary)  # positions are not learned


_apply.defvjp(_forward, _backward)


def _shared(rotary: Rotary, tokens: Any) -> tuple[Rotary, tuple[Any, Rotary]]:
    """Arguments of `by_token`: angles are every sequence's own, or shared by all of them."""
    own = rotary is not None and rotary[0].shape[0] > 1
    return (None, (tokens, rotary)) if own else (rotary, (tokens, None))


def _call_forward(queries: int, eps: float | None, interpret: bool, x: Array, rotary: Rotary) -> tuple[Array, Array]:
    batch, length, _, head_dim = x.shape
    shapes = [(batch, length, heads, head_dim) for heads in (queries, x.shape[2] - queries)]
    blocks = _Blocks(x.shape, queries)
    q, k = rows.call(
        functools.partial(_forward_kernel, eps=eps, blocks=blocks),
        name="heads_forward",
        interpret=interpret,
        grid=blocks.grid,
        in_specs=[blocks.all, *blocks.angles(rotary)],
        out_specs=[blocks.queries, blocks.keys],
        out_shape=[jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes],
    )(x, *(rotary or (None, None)))
    return q, k


def _forward_kernel(
    x_ref: Any, cos_ref: Any, sin_ref: Any, q_ref: Any, k_ref: Any, *, eps: float | None, blocks: "_Blocks"
) -> None:
    mask, is_query = blocks.real, pl.program_id(1) < blocks.query_heads
    first, second = (rows.load(x_ref, mask, *half) for half in blocks.halves)
    if eps is not None:
        scale = _scale(first, second, eps, blocks.head_dim)
        first, second = first * scale, second * scale
    if cos_ref is not None:
        cos, sin = rows.load(cos_ref, mask), rows.load(sin_ref, mask)
        first, second = first * cos - second * sin, second * cos + first * sin
    for half, value in zip(blocks.halves, (first, second), strict=True):
        rows.store(q_ref, value, mask & is_query, *half)
        rows.store(k_ref, value, mask & ~is_query, *half)


def _call_backward(
    eps: float | None, interpret: bool, x: Array | None, g_queries: Array, g_keys: Array, rotary: Rotary
) -> Array:
    batch, length, queries, head_dim = g_queries.shape
    shape = batch, length, queries + g_keys.shape[2], head_dim
    blocks = _Blocks(shape, queries)
    return rows.call(
        functools.partial(_backward_kernel, eps=eps, blocks=blocks),
        name="heads_backward",
        interpret=interpret,
        grid=blocks.grid,
        in_specs=[None if x is None else blocks.all, blocks.queries, blocks.keys, *blocks.angles(rotary)],
        out_specs=blocks.all,
        out_shape=jax.ShapeDtypeStruct(shape, g_queries.dtype),
    )(x, g_queries, g_keys, *(rotary or (None, None)))


def _backward_kernel(
    x_ref: Any,
    g_queries_ref: Any,
    g_keys_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    by_x_ref: Any,
    *,
    eps: float | None,
    blocks: "_Blocks",
) -> None:
    mask, is_query = blocks.real, pl.program_id(1) < blocks.query_heads
    first, second = (
        rows.load(g_queries_ref, mask & is_query, *half) + rows.load(g_keys_ref, mask & ~is_query, *half)
        for half in blocks.halves
    )
    if cos_ref is not None:
        cos, sin = rows.load(cos_ref, mask), rows.load(sin_ref, mask)
        first, second = first * cos + second * sin, second * cos - first * sin
    if x_ref is not None and eps is not None:
        x_first, x_second = (rows.load(x_ref, mask, *half) for half in blocks.halves)
        scale = _scale(x_first, x_second, eps, blocks.head_dim)
        inner = jnp.sum(first * x_first + second * x_second, axis=1, keepdims=True) / blocks.head_dim
        along = scale * scale * inner
        first, second = scale * (first - along * x_first), scale * (second - along * x_second)
    for half, value in zip(blocks.halves, (first, second), strict=True):
        rows.store(by_x_ref, value, mask, *half)


def _scale(first: Array, second: Array, eps: float, head_dim: int) -> Array:
    """What makes a head's root mean square 1."""
    total = jnp.sum(jnp.square(first) + jnp.square(second), axis=1, keepdims=True)
    return jax.lax.rsqrt(total / head_dim + eps)


class _Blocks:
    """One head of some tokens for each program; queries' heads come first."""

    def __init__(self, shape: tuple[int, ...], queries: int) -> None:
        batch, self.length, heads, self.head_dim = shape
        self.query_heads = queries
        self.half = rows.power_of_two(self.head_dim // 2)
        self.tokens = min(rows.rows_at_once(2 * self.half), rows.power_of_two(self.length))
        self.grid = pl.cdiv(self.length, self.tokens), heads, batch
        self.halves = (slice(None), pl.ds(0, self.half)), (slice(None), pl.ds(self.head_dim // 2, self.half))
        block = None, self.tokens, None, 2 * self.half
        self.all = pl.BlockSpec(block, lambda i, h, b: (b, i, h, 0))
        self.queries = pl.BlockSpec(block, lambda i, h, b: (b, i, jnp.minimum(h, queries - 1), 0))
        self.keys = pl.BlockSpec(block, lambda i, h, b: (b, i, jnp.maximum(h - queries, 0), 0))

    def angles(self, rotary: Rotary) -> list[pl.BlockSpec | None]:
        """Of cosines and sines."""
        if rotary is None:
            return [None, None]
        shared = rotary[0].shape[0] == 1
        return 2 * [pl.BlockSpec((None, self.tokens, None, self.half), lambda i, h, b: (0 if shared else b, i, 0, 0))]

    @property
    def real(self) -> Array:
        """Which numbers of half a head are no padding."""
        tokens = pl.program_id(0) * self.tokens + jnp.arange(self.tokens) < self.length
        return tokens[:, None] & (jnp.arange(self.half) < self.head_dim // 2)[None]
