"""Attention by cuDNN, for the shapes and masks that it takes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cramjax import devices
from cramjax.kernels.attention.mask import Mask
from cramjax.kernels.choice import nothing_in


def cudnn_refusal(q: Array, k: Array, mask: Mask, softcap: float | None) -> str | None:
    """Why cuDNN cannot compute this on the device that is traced for; None when it can."""
    target = devices.target()
    if target.platform != "gpu":
        return f"cuDNN is for NVIDIA GPUs and this is a {target.platform}"
    if target.ahead_of_time:
        return "its plan is made on the GPU itself, and this is compiled ahead of time"
    if not target.at_least(8.0):
        return f"it needs compute capability 8.0, and {target.kind} has {target.capability}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, not {q.dtype}"
    if q.shape[3] > 128 or q.shape[3] % 8:
        return f"its heads are multiples of 8 up to 128, not {q.shape[3]}"
    if q.shape[1] % 2 or k.shape[1] % 2:
        # JAX refuses them in training only: it takes its own placeholder for a bias, which cuDNN wants even.
        return f"JAX gives it even lengths only, not {q.shape[1]} queries and {k.shape[1]} keys"
    if softcap is not None:
        return "it has no soft-cap"
    if mask.query_segment_ids is not None or mask.kv_mask is not None:
        return "documents and padding would need a mask of all pairs"
    if mask.query_positions is not None:
        return "it places queries at 0, 1, …, and cached decoding places them elsewhere"
    if mask.window is not None and not mask.causal:
        return "its window looks back only"
    if (mask.causal or mask.window is not None) and q.shape[1] != k.shape[1]:
        return f"its causal mask needs as many keys as queries, not {k.shape[1]} for {q.shape[1]}"
    return nothing_in(q.shape, k.shape)


def cudnn(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch kv_seq kv_heads head_dim"],
    v: Float[Array, "batch kv_seq kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Attention with float32 scores and softmax, for what `cudnn_refusal` lets through."""
    assert softcap is None
    window = None if mask.window is None else (mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=mask.causal, local_window_size=window, implementation="cudnn"
    )
