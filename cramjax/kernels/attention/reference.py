"""Attention as it is defined, one line per step: what the other implementations are tested against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cramjax.kernels.attention.mask import Mask


def reference(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch kv_seq kv_heads head_dim"],
    v: Float[Array, "batch kv_seq kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention, in float32 or better; a query that sees no key yields zeros."""
    dtype, groups = q.dtype, q.shape[2] // k.shape[2]
    q, k, v = (x.astype(jnp.promote_types(dtype, jnp.float32)) for x in (q, k, v))
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    allowed = mask.block((0, q.shape[1]), (0, k.shape[1]))
    if allowed is not None:
        scores = jnp.where(allowed[:, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if allowed is not None:
        weights = jnp.where(allowed[:, None], weights, 0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).astype(dtype)
