"""Cross entropy of a linear head as it is defined: all logits at once, one loss per token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cramjax.kernels.dense.packed import Packed


class CrossEntropy(NamedTuple):
    """What the head says about each token."""

    nll: Float[Array, " tokens"]
    """Negative log-likelihood in nats."""
    penalty: Float[Array, " tokens"]
    """z-loss: its weight times the squared log-partition."""
    correct: Bool[Array, " tokens"]
    """Whether no other token has a greater logit."""


def head_logits(
    hidden: Float[Array, "*tokens embed"],
    weight: Float[Array, "embed vocab"] | Packed,
    *,
    bias: Float[Array, " vocab"] | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Float[Array, "*tokens vocab"]:
    """Logits in float32; the soft-cap acts on the sum with the bias, and columns past `vocab_size` are -inf."""
    if isinstance(weight, Packed):
        rows = weight.multiply(hidden.reshape(-1, hidden.shape[-1]), jnp.float32)
        logits = rows.reshape(*hidden.shape[:-1], -1)
    else:
        logits = jnp.matmul(hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if vocab_size is not None and vocab_size < weight.shape[1]:
        logits = jnp.where(jnp.arange(weight.shape[1]) < vocab_size, logits, -jnp.inf)
    return logits


def cross_entropy(
    hidden: Float[Array, "tokens embed"],
    weight: Float[Array, "embed vocab"],
    targets: Int[Array, " tokens"],
    *,
    bias: Float[Array, " vocab"] | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> CrossEntropy:
    """Loss of each token under a linear head with softmax.

    Args:
        hidden: inputs of the head (tokens, embed).
        weight: the head's matrix (embed, vocab).
        targets: true token ids (tokens,).
        bias: added to the logits (vocab,).
        softcap: squashes the logits into ±softcap.
        z_loss: weight of the squared log-partition.
        vocab_size: columns from this one on are padding and get no probability.
    """
    logits = head_logits(hidden, weight, bias=bias, softcap=softcap, vocab_size=vocab_size)
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return CrossEntropy(
        nll=log_partition - target,
        penalty=z_loss * jnp.square(log_partition),
        correct=target >= jnp.max(logits, axis=-1),
    )
