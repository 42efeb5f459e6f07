"""Attention in plain XLA operations, in the form that is fastest on a CPU.

Products are batch-major, and queries are cut into chunks that each read only the keys they can see: that skips nearly
half of the work under a causal mask, and most of it under a window. XLA's derivative of this is as fast as one by hand.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cramjax.kernels.attention.mask import Mask


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
    q = (q * scale).reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    size = chunk_size(length) if mask.skips else length
    chunks = []
    for start in range(0, length, size):
        queries = (start, min(start + size, length))
        keys = mask.visible_keys(queries, kv_length)
        part = (q[:, :, :, slice(*queries)], k[:, :, slice(*keys)], v[:, :, slice(*keys)])
        chunks.append(_attend(*part, mask, queries, keys, softcap))
    out = chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def chunk_size(length: int) -> int:
    """Queries in a chunk: small enough to skip much, large enough for the products; at most eight chunks when long.

    Args:
        length: queries of a sequence.
    """
    return 32 if length <= 128 else -(-length // 512) * 64


def _attend(
    q: Float[Array, "batch kv_heads group seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    mask: Mask,
    queries: tuple[int, int],
    keys: tuple[int, int],
    softcap: float | None,
) -> Float[Array, "batch kv_heads group seq head_dim"]:
    if keys[0] == keys[1]:
        return jnp.zeros_like(q)
    scores = jnp.einsum("bhgqd,bhkd->bhgqk", q, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    allowed = mask.block(queries, keys)
    if allowed is not None:
        allowed = allowed[:, None, None]
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if allowed is not None and mask.may_hide_all(queries, keys):
        weights = jnp.where(allowed, weights, 0)
    out = jnp.einsum("bhgqk,bhkd->bhgqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(v.dtype)
