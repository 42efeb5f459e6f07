"""Fused attention for NVIDIA GPUs, in Pallas through its Triton lowering: scores never leave the chip.

The forward kernel walks the keys with an online softmax and keeps one number per query for the backward pass, the
log-sum-exp of its scores; the two backward kernels recompute the probabilities from it (Dao 2023, "FlashAttention-2").
Each walk visits only the blocks between the first and the last that the mask leaves anything of.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from cramjax import devices
from cramjax.kernels.attention.mask import Mask
from cramjax.kernels.attention.partition import by_sequence
from cramjax.kernels.attention.tiles import SHARED_MEMORY, Tile, Tiles, choose_tiles
from cramjax.kernels.choice import nothing_in
from cramjax.kernels.triton import LOG2E, missing, triton_call

_LOWEST = float(np.finfo(np.float32).min)
_HIDDEN = np.iinfo(np.int32).min
"""The document of padding: no query is in it."""


def pallas_refusal(q: Array, k: Array, mask: Mask, softcap: float | None) -> str | None:
    """Why the kernels cannot run on the device that is traced for; None when they can."""
    target = devices.target()
    if reason := missing():
        return reason
    if target.platform != "gpu":
        return f"its kernels are for NVIDIA GPUs and this is a {target.platform}"
    if target.capability not in SHARED_MEMORY:
        known = ", ".join(SHARED_MEMORY)
        return f"{target.kind} has compute capability {target.capability}, and the kernels have tiles for {known}"
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"its kernels are for float32, bfloat16 and float16, not {q.dtype}"
    if q.shape[3] > 256:
        return f"its tiles hold heads of at most 256, not {q.shape[3]}"
    if mask.shared:
        return "it has no keys that all documents share"
    if mask.query_positions is not None:
        return "it places queries at 0, 1, …, and cached decoding places them elsewhere"
    return nothing_in(q.shape, k.shape)


def pallas(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch kv_seq kv_heads head_dim"],
    v: Float[Array, "batch kv_seq kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """Attention with float32 scores and softmax; a query that sees no key yields zeros.

    Args:
        q: queries (batch, seq, heads, head_dim).
        k: keys (batch, kv_seq, kv_heads, head_dim).
        v: values, shaped as the keys.
        mask: the pairs that attend; its queries stand at 0, 1, ….
        scale: multiplies the scores.
        softcap: squashes the scores into ±softcap.
        tiles: sizes to use instead of those for the GPU.
        interpret: run the kernels as plain operations, on any device.
    """
    head_dim = max(16, _power_of_two(q.shape[3]))
    if tiles is None:
        capability = None if interpret else devices.target().capability
        tiles = choose_tiles(head_dim, q.dtype.itemsize, capability or "8.0")
    tiles = Tiles(*(_clip(tile, q.shape[1], k.shape[1]) for tile in (tiles.forward, tiles.dq, tiles.dkv)))
    each = (tiles.forward, tiles.dq, tiles.dkv)
    q_length = _round_up(q.shape[1], max(tile.block_q for tile in each))
    kv_length = _round_up(k.shape[1], max(tile.block_k for tile in each))
    q_ids, kv_ids = _documents(mask, q.shape[:2], k.shape[:2])
    if q_ids is not None and kv_ids is not None:
        q_ids = jnp.pad(q_ids, ((0, 0), (0, q_length - q.shape[1])), mode="edge")
        kv_ids = jnp.pad(kv_ids, ((0, 0), (0, kv_length - k.shape[1])), constant_values=_HIDDEN)
    problem = _Problem(
        q_length=q.shape[1],
        kv_length=k.shape[1],
        padded=kv_length > k.shape[1],
        causal=mask.causal,
        window=mask.window,
        scale=scale,
        softcap=softcap,
        tiles=tiles,
        interpret=interpret,
    )
    padded = _pad(q, q_length, head_dim), *(_pad(x, kv_length, head_dim) for x in (k, v))
    out: Array = _attend(problem, *padded, q_ids, kv_ids)
    return out[:, : q.shape[1], :, : q.shape[3]]


@dataclass(frozen=True)
class _Problem:
    """What is known when the kernels are compiled, beside the shapes of their padded operands."""

    q_length: int
    kv_length: int
    """Real queries and keys; the rest is padding."""
    padded: bool
    """Whether there are keys of padding."""
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    tiles: Tiles
    interpret: bool


def _documents(
    mask: Mask, q_shape: tuple[int, ...], kv_shape: tuple[int, ...]
) -> tuple[Int[Array, "batch seq"], Int[Array, "batch kv_seq"]] | tuple[None, None]:
    """Documents of queries and keys; padding among the keys is a document that no query is in."""
    if mask.query_segment_ids is None and mask.kv_mask is None:
        return None, None
    q_ids, kv_ids = jnp.zeros(q_shape, jnp.int32), jnp.zeros(kv_shape, jnp.int32)
    if mask.query_segment_ids is not None and mask.kv_segment_ids is not None:
        q_ids, kv_ids = mask.query_segment_ids.astype(jnp.int32), mask.kv_segment_ids.astype(jnp.int32)
    if mask.kv_mask is not None:
        kv_ids = jnp.where(mask.kv_mask, kv_ids, _HIDDEN)
    return q_ids, kv_ids


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem: _Problem, q: Array, k: Array, v: Array, q_ids: Array | None, kv_ids: Array | None) -> Array:
    return _forward_anywhere(problem, q, k, v, q_ids, kv_ids)[0]


def _attend_forward(
    problem: _Problem, q: Array, k: Array, v: Array, q_ids: Array | None, kv_ids: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    out, lse = _forward_anywhere(problem, q, k, v, q_ids, kv_ids)
    return out, (q, k, v, q_ids, kv_ids, out, lse)


def _attend_backward(problem: _Problem, residuals: tuple[Any, ...], d_out: Array) -> tuple[Any, ...]:
    q, k, v, q_ids, kv_ids, out, lse = residuals
    delta = jnp.einsum("bshd,bshd->bhs", d_out, out, preferred_element_type=jnp.float32)
    return *_backward_anywhere(problem, q, k, v, q_ids, kv_ids, d_out, lse, delta), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    problem: _Problem, q: Array, k: Array, v: Array, q_ids: Array | None, kv_ids: Array | None
) -> tuple[Float[Array, "batch seq heads head_dim"], Float[Array, "batch heads seq"]]:
    """The output, and the base-2 log-sum-exp of each query's scores (0 where it sees no key)."""
    tile = problem.tiles.forward
    blocks = _Queries(q, k, tile)
    visits = _visits(_visible(problem, tile, q, k, q_ids, kv_ids))
    return _call(
        _forward_kernel,
        problem,
        tile,
        grid=blocks.grid,
        in_specs=[blocks.q, blocks.kv, blocks.kv, *blocks.ids(q_ids), blocks.visits(visits)],
        out_specs=[blocks.q, blocks.per_query],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32),
        ],
    )(q, k, v, q_ids, kv_ids, visits)


def _forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    q_ids_ref: Any,
    kv_ids_ref: Any,
    visits_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    problem: _Problem,
    tile: Tile,
) -> None:
    q = q_ref[...]
    q_at, q_ids = _places(pl.program_id(0), tile.block_q, q_ids_ref, column=True)

    def visit(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, greatest, out = carry
        keys = pl.ds(block * tile.block_k, tile.block_k)
        kv_at, kv_ids = _places(block, tile.block_k, kv_ids_ref, column=False, rows=keys)
        scores, _ = _scores(problem, q, k_ref[keys, :], (q_at, q_ids), (kv_at, kv_ids))
        new = jnp.maximum(greatest, jnp.max(scores, axis=1))
        shrink = jnp.exp2(greatest - new)
        powers = jnp.exp2(scores - new[:, None])
        v = v_ref[keys, :]
        out = out * shrink[:, None] + _dot(powers.astype(v.dtype), v)
        return total * shrink + jnp.sum(powers, axis=1), new, out

    nothing = jnp.zeros(tile.block_q, jnp.float32)
    carry = nothing, jnp.full(tile.block_q, _LOWEST, jnp.float32), jnp.zeros(q.shape, jnp.float32)
    total, greatest, out = jax.lax.fori_loop(visits_ref[0], visits_ref[1], visit, carry)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(seen, greatest + jnp.log2(total), 0.0)


def _backward_queries(
    problem: _Problem,
    q: Array,
    k: Array,
    v: Array,
    q_ids: Array | None,
    kv_ids: Array | None,
    d_out: Array,
    lse: Array,
    delta: Array,
) -> Float[Array, "batch seq heads head_dim"]:
    tile = problem.tiles.dq
    blocks = _Queries(q, k, tile)
    visits = _visits(_visible(problem, tile, q, k, q_ids, kv_ids))
    in_specs = [blocks.q, blocks.kv, blocks.kv, *blocks.ids(q_ids), blocks.visits(visits)]
    return _call(
        _dq_kernel,
        problem,
        tile,
        grid=blocks.grid,
        in_specs=[*in_specs, blocks.q, blocks.per_query, blocks.per_query],
        out_specs=blocks.q,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(q, k, v, q_ids, kv_ids, visits, d_out, lse, delta)


def _dq_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    q_ids_ref: Any,
    kv_ids_ref: Any,
    visits_ref: Any,
    d_out_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    dq_ref: Any,
    *,
    problem: _Problem,
    tile: Tile,
) -> None:
    q, d_out = q_ref[...], d_out_ref[...]
    lse, delta = lse_ref[...][:, None], delta_ref[...][:, None]
    q_at, q_ids = _places(pl.program_id(0), tile.block_q, q_ids_ref, column=True)

    def visit(block: Array, dq: Array) -> Array:
        keys = pl.ds(block * tile.block_k, tile.block_k)
        kv_at, kv_ids = _places(block, tile.block_k, kv_ids_ref, column=False, rows=keys)
        k = k_ref[keys, :]
        scores, slope = _scores(problem, q, k, (q_at, q_ids), (kv_at, kv_ids))
        d_scores = jnp.exp2(scores - lse) * (_dot(d_out, v_ref[keys, :], transposed=True) - delta)
        if slope is not None:
            d_scores = d_scores * slope
        return dq + _dot(d_scores.astype(k.dtype), k)

    dq = jax.lax.fori_loop(visits_ref[0], visits_ref[1], visit, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * problem.scale).astype(dq_ref.dtype)


def _backward_keys(
    problem: _Problem,
    q: Array,
    k: Array,
    v: Array,
    q_ids: Array | None,
    kv_ids: Array | None,
    d_out: Array,
    lse: Array,
    delta: Array,
) -> tuple[Float[Array, "batch kv_seq kv_heads head_dim"], Float[Array, "batch kv_seq kv_heads head_dim"]]:
    tile = problem.tiles.dkv
    batch, q_length, heads, head_dim = q.shape
    kv_length, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    visits = _visits(jnp.swapaxes(_visible(problem, tile, q, k, q_ids, kv_ids), 1, 2))
    queries = pl.BlockSpec((None, q_length, group, head_dim), lambda i, h, b: (b, 0, h, 0))
    keys = pl.BlockSpec((None, tile.block_k, None, head_dim), lambda i, h, b: (b, i, h, 0))
    per_query = pl.BlockSpec((None, group, q_length), lambda i, h, b: (b, h, 0))
    q_document = pl.BlockSpec((None, q_length), lambda i, h, b: (b, 0))
    kv_document = pl.BlockSpec((None, tile.block_k), lambda i, h, b: (b, i))
    documents = [None, None] if q_ids is None else [q_document, kv_document]
    return _call(
        _dkv_kernel,
        problem,
        tile,
        grid=(kv_length // tile.block_k, kv_heads, batch),
        in_specs=[queries, keys, keys, *documents, _visits_spec(visits), queries, per_query, per_query],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
    )(q, k, v, q_ids, kv_ids, visits, d_out, lse, delta)


def _dkv_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    q_ids_ref: Any,
    kv_ids_ref: Any,
    visits_ref: Any,
    d_out_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    problem: _Problem,
    tile: Tile,
) -> None:
    k, v = k_ref[...], v_ref[...]
    kv_at, kv_ids = _places(pl.program_id(0), tile.block_k, kv_ids_ref, column=True)

    # Everything is transposed here, (keys, queries): the probabilities are then the left operand of both products.
    def visit(head: int | Array, block: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dk, dv = carry
        rows = pl.ds(block * tile.block_q, tile.block_q)
        q_at, q_ids = _places(block, tile.block_q, q_ids_ref, column=False, rows=rows)
        q, d_out = q_ref[rows, head, :], d_out_ref[rows, head, :]
        scores, slope = _scores(problem, k, q, (q_at, q_ids), (kv_at, kv_ids))
        weights = jnp.exp2(scores - lse_ref[head, rows][None])
        dv = dv + _dot(weights.astype(d_out.dtype), d_out)
        d_scores = weights * (_dot(v, d_out, transposed=True) - delta_ref[head, rows][None])
        if slope is not None:
            d_scores = d_scores * slope
        return dk + _dot(d_scores.astype(q.dtype), q), dv

    def walk(head: int | Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.lax.fori_loop(visits_ref[0], visits_ref[1], functools.partial(visit, head), carry)

    carry = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    group = q_ref.shape[1]
    dk, dv = walk(0, carry) if group == 1 else jax.lax.fori_loop(0, group, walk, carry)
    dk_ref[...] = (dk * problem.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _backward(problem: _Problem, *operands: Array | None) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values; operands as of `_backward_queries`."""
    return _backward_queries(problem, *operands), *_backward_keys(problem, *operands)  # pyright: ignore[reportArgumentType]


def _scores(
    problem: _Problem,
    left: Array,
    right: Array,
    queries: tuple[Array, Array | None],
    keys: tuple[Array, Array | None],
) -> tuple[Array, Array | None]:
    """Scores of a tile in units of log 2, -inf where masked, and the derivative of the soft-cap.

    Args:
        problem: the masks, scale and soft-cap.
        left: queries, or keys (rows, head_dim).
        right: keys, or queries (columns, head_dim).
        queries: their positions and documents, as a column or a row.
        keys: likewise, the other way.
    """
    scores, slope = _dot(left, right, transposed=True), None
    if problem.softcap is None:
        scores = scores * (problem.scale * LOG2E)
    else:
        squashed = jnp.tanh(scores * (problem.scale / problem.softcap))
        scores, slope = squashed * (problem.softcap * LOG2E), 1 - squashed * squashed
    (q_at, q_ids), (kv_at, kv_ids) = queries, keys
    parts = []
    if problem.causal:
        parts.append(kv_at <= q_at)
    if problem.window is not None:
        parts.append(q_at - kv_at < problem.window)
        if not problem.causal:
            parts.append(kv_at - q_at < problem.window)
    if q_ids is not None:
        parts.append(q_ids == kv_ids)
    elif problem.padded:
        parts.append(kv_at < problem.kv_length)
    if parts:
        scores = jnp.where(functools.reduce(jnp.logical_and, parts), scores, -jnp.inf)
    return scores, slope


def _dot(a: Array, b: Array, *, transposed: bool = False) -> Float[Array, "rows columns"]:
    """The product of a and b, or of a and b transposed, summed in float32."""
    axes = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _places(
    block: Any, size: int, ids_ref: Any, *, column: bool, rows: Any = slice(None)
) -> tuple[Int[Array, "rows columns"], Int[Array, "rows columns"] | None]:
    """Positions and documents of a block, as a column or a row."""
    shape = (size, 1) if column else (1, size)
    at = (block * size + jnp.arange(size, dtype=jnp.int32)).reshape(shape)
    return at, None if ids_ref is None else ids_ref[rows].reshape(shape)


class _Queries:
    """Blocks of the kernels that run once for each block of queries."""

    def __init__(self, q: Array, k: Array, tile: Tile) -> None:
        batch, q_length, heads, head_dim = q.shape
        kv_length, group = k.shape[1], heads // k.shape[2]
        self.grid = (q_length // tile.block_q, heads, batch)
        self.q = pl.BlockSpec((None, tile.block_q, None, head_dim), lambda i, h, b: (b, i, h, 0))
        self.kv = pl.BlockSpec((None, kv_length, None, head_dim), lambda i, h, b: (b, 0, h // group, 0))
        self.per_query = pl.BlockSpec((None, None, tile.block_q), lambda i, h, b: (b, h, i))
        self._documents = [
            pl.BlockSpec((None, tile.block_q), lambda i, h, b: (b, i)),
            pl.BlockSpec((None, kv_length), lambda i, h, b: (b, 0)),
        ]
        self.visits = _visits_spec

    def ids(self, q_ids: Array | None) -> list[pl.BlockSpec | None]:
        return [None, None] if q_ids is None else [*self._documents]


def _visible(
    problem: _Problem, tile: Tile, q: Array, k: Array, q_ids: Array | None, kv_ids: Array | None
) -> Bool[Array, "rows q_blocks kv_blocks"]:
    """Whether a query of one block may see a key of another; the first axis is 1 if that is known beforehand."""
    q_first = jnp.arange(0, q.shape[1], tile.block_q)[:, None]
    q_last = jnp.minimum(q_first + tile.block_q, problem.q_length) - 1
    kv_first = jnp.arange(0, k.shape[1], tile.block_k)
    kv_last = jnp.minimum(kv_first + tile.block_k, problem.kv_length) - 1
    visible = (q_first < problem.q_length) & (kv_first < problem.kv_length)
    if problem.causal:
        visible &= kv_first <= q_last
    if problem.window is not None:
        visible &= q_first - kv_last < problem.window
        if not problem.causal:
            visible &= kv_first - q_last < problem.window
    if q_ids is None or kv_ids is None:
        return visible[None]
    # Documents may come in any order: blocks whose ranges of numbers do not meet share none.
    q_ids = q_ids.reshape(len(q_ids), -1, 1, tile.block_q)
    kv_ids = kv_ids.reshape(len(kv_ids), 1, -1, tile.block_k)
    least = jnp.min(jnp.where(kv_ids == _HIDDEN, np.iinfo(np.int32).max, kv_ids), axis=-1)
    meet = (jnp.min(q_ids, axis=-1) <= jnp.max(kv_ids, axis=-1)) & (least <= jnp.max(q_ids, axis=-1))
    return meet & visible


def _visits(visible: Bool[Array, "rows blocks others"]) -> Int[Array, "rows blocks 2"]:
    """The first visible block of others, and the one after the last, for each block."""
    count = visible.shape[2]
    last = count - jnp.argmax(visible[..., ::-1], axis=2)
    first = jnp.argmax(visible, axis=2)
    any_visible = jnp.any(visible, axis=2)
    return jnp.stack([first, jnp.where(any_visible, last, first)], axis=-1).astype(jnp.int32)


def _visits_spec(visits: Int[Array, "rows blocks 2"]) -> pl.BlockSpec:
    shared = visits.shape[0] == 1
    return pl.BlockSpec((None, None, 2), lambda i, h, b: (0 if shared else b, i, 0))


def _call(kernel: Callable[..., None], problem: _Problem, tile: Tile, **arguments: Any) -> Callable[..., Any]:
    return triton_call(
        functools.partial(kernel, problem=problem, tile=tile),
        name=f"attention{kernel.__name__.removesuffix('_kernel')}",
        interpret=problem.interpret,
        warps=tile.warps,
        stages=tile.stages,
        **arguments,
    )


def _clip(tile: Tile, q_length: int, kv_length: int) -> Tile:
    """No larger than the sequence, and no smaller than a tensor core's operand."""
    block_q = min(tile.block_q, max(16, _power_of_two(q_length)))
    return Tile(block_q, min(tile.block_k, max(16, _power_of_two(kv_length))), tile.warps, tile.stages)


def _pad(x: Float[Array, "batch seq heads head_dim"], length: int, head_dim: int) -> Array:
    widths = (0, 0), (0, length - x.shape[1]), (0, 0), (0, head_dim - x.shape[3])
    return x if widths == ((0, 0),) * 4 else jnp.pad(x, widths)


def _round_up(length: int, block: int) -> int:
    return -(-length // block) * block


def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length()


_forward_anywhere = by_sequence(_forward)
_backward_anywhere = by_sequence(_backward)
