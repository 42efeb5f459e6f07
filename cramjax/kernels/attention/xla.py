"""Attention in plain XLA operations, in the formulation that is fastest on a CPU: batch-major products."""

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
    groups = heads // k.shape[2]
    q = (q * scale).reshape(batch, length, k.shape[2], groups, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bhgqd,bhkd->bhgqk", q, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    allowed = mask.block((0, length), (0, k.shape[2]))
    if allowed is not None:
        allowed = allowed[:, None, None]
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0)
    out = jnp.einsum("bhgqk,bhkd->bhgqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(v.dtype).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)
