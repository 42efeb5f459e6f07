"""Attention in plain XLA operations, in the form that is fastest on a CPU, with a backward pass of its own.

Queries are cut into chunks that each read only the keys they can see: that skips nearly half of the work under a causal
mask, and most of it under a window. The backward pass computes scores again from their log-sum-exp, and long chunks are
walked in blocks, so that memory grows with the sequence and not with its square; but a CPU keeps the numerators of the
softmax over few keys, in the precision that they were multiplied in. Every product is of row-major
matrices, with the heads as its batch (see `cramjax.kernels.dense`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cramjax import devices
from cramjax.kernels.attention.mask import Mask
from cramjax.kernels.dense import matmul, row_major, transposed


def xla(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch kv_seq kv_heads head_dim"],
    v: Float[Array, "batch kv_seq kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Attention with float32 scores and softmax; a query that sees no key yields zeros."""
    batch, length, heads, head_dim = q.shape
    kv_length, kv_heads = k.shape[1:3]
    q = row_major(q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4))
    k, v = row_major(k.transpose(0, 2, 1, 3)), row_major(v.transpose(0, 2, 1, 3))
    size, chunks = chunk_size(length, mask.skips), []
    for start in range(0, length, size):
        queries = (start, min(start + size, length))
        keys = mask.visible_keys(queries, kv_length)
        keeps = devices.target().platform == "cpu" and softcap is None and keys[1] - keys[0] <= MOST_KEPT_KEYS
        hides = mask.may_hide_all(queries, keys)
        chunk = _Chunk(queries, keys, mask.causal, mask.window, mask.shared, hides, scale, softcap, keeps)
        part = q[:, :, :, slice(*queries)]
        if keys[0] == keys[1]:
            chunks.append(jnp.zeros_like(part))
            continue
        attend = _attend if size <= MOST_QUERIES else _attend_in_blocks
        hidden = mask.query_segment_ids, mask.kv_segment_ids, mask.kv_mask, mask.query_positions
        chunks.append(attend(chunk, part, k[:, :, slice(*keys)], v[:, :, slice(*keys)], hidden))
    out = chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


MOST_QUERIES = 256
"""Queries whose scores exist at a time."""
MOST_KEPT_KEYS = 256
"""Keys of a chunk up to which a CPU keeps the softmax for the backward pass."""


def chunk_size(length: int, skips: bool) -> int:
    """Queries in a chunk: small enough to skip much, large enough for the products; at most eight chunks when long.

    Args:
        length: queries of a sequence.
        skips: whether a chunk sees fewer than all keys.
    """
    if not skips and length <= MOST_QUERIES:
        return max(length, 1)
    return 64 if length <= 128 else max(128, -(-length // 1024) * 128)


class _Chunk(NamedTuple):
    """What is known of a chunk when it is compiled, beside its shapes."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    """The ranges [start, stop) of positions that it is made of."""
    causal: bool
    window: int | None
    shared: int
    may_hide_all: bool
    """Whether a query of it may see no key."""
    scale: float
    softcap: float | None
    keeps: bool
    """Whether the backward pass gets the numerators of the softmax, or computes them again."""


def _attend_in_blocks(chunk: _Chunk, q: Array, k: Array, v: Array, hidden: tuple[Array | None, ...]) -> Array:
    """What `_attend` gives, of a chunk that is walked in blocks: the scores of one exist at a time."""
    q_segment_ids, kv_segment_ids, kv_mask, positions = hidden
    start, stop = chunk.queries
    size = MOST_QUERIES // 2
    count = -(-(stop - start) // size)
    padding = count * size - (stop - start)
    positions = jnp.arange(start, stop)[None] if positions is None else positions[:, start:stop]

    def blocks(x: Array, axis: int, mode: str = "edge") -> Array:
        padded = jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)], mode=mode)
        return jnp.moveaxis(padded.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    own = chunk._replace(queries=(0, size), keeps=False)
    ids = None if q_segment_ids is None else blocks(q_segment_ids[:, start:stop], 1)

    def block(item: tuple[Array, Array, Array | None]) -> Array:
        q, positions, ids = item
        return _attend(own, q, k, v, (ids, kv_segment_ids, kv_mask, positions))

    out = jax.lax.map(block, (blocks(q, 3), blocks(positions, 1), ids))
    out = jnp.moveaxis(out, 0, 3)
    return out.reshape(*q.shape[:3], count * size, q.shape[4])[:, :, :, : stop - start]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    chunk: _Chunk,
    q: Float[Array, "batch kv_heads group seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    hidden: tuple[Array | None, ...],
) -> Float[Array, "batch kv_heads group seq head_dim"]:
    """Attention of a chunk; `hidden` holds the arrays of its mask."""
    return _forward(chunk, q, k, v, hidden)[0]


def _forward(
    chunk: _Chunk, q: Array, k: Array, v: Array, hidden: tuple[Array | None, ...]
) -> tuple[Array, tuple[Any, ...]]:
    scores, _ = _scores(chunk, q, k)
    allowed = _allowed(chunk, hidden)
    if allowed is not None:
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    greatest = jnp.max(scores, axis=-1, keepdims=True)
    powers = jnp.exp(scores - greatest)
    if allowed is not None and chunk.may_hide_all:
        powers = jnp.where(allowed, powers, 0.0)
    powers = powers.astype(v.dtype)
    total = jnp.sum(powers, axis=-1, keepdims=True, dtype=jnp.float32)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    out = (_product(powers, v) / total).astype(v.dtype)
    if chunk.keeps:
        return out, (q, k, v, hidden, out, (powers, total))
    return out, (q, k, v, hidden, out, jnp.where(seen, greatest, 0.0) + jnp.log(total))


def _backward(chunk: _Chunk, residuals: tuple[Any, ...], d_out: Array) -> tuple[Any, ...]:
    # Without the barrier XLA would find the forward pass's scores here, and keep them instead.
    q, k, v, hidden, out, softmax = jax.lax.optimization_barrier(residuals)
    dtype = q.dtype
    if chunk.keeps:  # the denominators divide what is narrower than the numerators
        weights, total = softmax
        slope, d_out = None, row_major((d_out / total).astype(dtype))
    else:
        d_out = row_major(d_out)
        scores, slope = _scores(chunk, q, k)
        if (allowed := _allowed(chunk, hidden)) is not None:
            scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
        weights = jnp.exp(scores - softmax)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = weights * (_product(d_out, transposed(v)) - delta) * chunk.scale
    if slope is not None:
        d_scores = d_scores * slope
    weights, d_scores = weights.astype(dtype), d_scores.astype(dtype)
    d_q = _product(d_scores, k).astype(dtype)
    # Transposed products, of a narrow transposition instead of a wide one.
    d_k = transposed(matmul(transposed(_rows(q)), _rows(d_scores)).astype(dtype))
    d_v = transposed(matmul(transposed(_rows(d_out)), _rows(weights)).astype(dtype))
    return d_q, d_k, d_v, None


_attend.defvjp(_forward, _backward)


def _scores(chunk: _Chunk, q: Array, k: Array) -> tuple[Float[Array, "batch kv_heads group seq kv_seq"], Array | None]:
    """Scores of all pairs, and the derivative of the soft-cap."""
    scores = _product(q, transposed(k)) * chunk.scale
    if chunk.softcap is None:
        return scores, None
    squashed = jnp.tanh(scores / chunk.softcap)
    return chunk.softcap * squashed, 1 - jnp.square(squashed)


def _allowed(chunk: _Chunk, hidden: tuple[Array | None, ...]) -> Bool[Array, "rows 1 1 seq kv_seq"] | None:
    block = Mask(chunk.causal, chunk.window, *hidden, shared=chunk.shared).block(chunk.queries, chunk.keys)
    return None if block is None else block[:, None, None]


def _rows(x: Float[Array, "batch kv_heads group seq width"]) -> Float[Array, "batch kv_heads rows width"]:
    """The rows of all heads of a group, one head after the other."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _product(x: Array, matrix: Array) -> Array:
    """Multiply the rows of all heads of a group with the matrix of their key and value head."""
    return matmul(_rows(x), matrix).reshape(*x.shape[:-1], matrix.shape[-1])
