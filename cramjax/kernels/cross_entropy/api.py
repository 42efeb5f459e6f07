"""The loss of training: cross entropy summed over weighted tokens."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cramjax.kernels.cross_entropy.fused import weighted_loss


class CrossEntropySums(NamedTuple):
    """Sums over weighted tokens; only `total` is differentiable."""

    total: Float[Array, ""]
    """nll + penalty."""
    nll: Float[Array, ""]
    penalty: Float[Array, ""]
    correct: Float[Array, ""]


def cross_entropy_sum(
    hidden: Float[Array, "tokens embed"],
    weight: Float[Array, "embed vocab"],
    targets: Int[Array, " tokens"],
    token_weights: Float[Array, " tokens"] | None = None,
    *,
    bias: Float[Array, " vocab"] | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    tied: bool = False,
) -> CrossEntropySums:
    """Summed cross entropy of a linear head; see `cross_entropy` for the arguments.

    Args:
        token_weights: weight of each token in the sums (tokens,): 0 leaves a token out. Default: 1.
        tied: whether `weight` is the transposition of an embedding (vocab, embed), which is then read as it lies in
            memory. It changes the speed only.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(hidden, weight, targets, token_weights, bias)
    options = {"softcap": softcap, "z_loss": z_loss, "vocab_size": vocab_size, "tied": tied}
    loss = weighted_loss(hidden, weight, targets, token_weights, bias, **options)
    correct = loss.correct if token_weights is None else loss.correct * token_weights
    return CrossEntropySums(loss.total, loss.nll, loss.penalty, jnp.sum(correct))


def _check(hidden: Array, weight: Array, targets: Array, token_weights: Array | None, bias: Array | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[0]:
        wanted = "(tokens, embed) and (embed, vocab)"
        raise ValueError(f"hidden and weight must have shape {wanted}, got {hidden.shape} and {weight.shape}")
    tokens, vocab = hidden.shape[:1], weight.shape[1:]
    wanted = {"targets": (targets, tokens), "token_weights": (token_weights, tokens), "bias": (bias, vocab)}
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            given = f"hidden of shape {hidden.shape} and weight of shape {weight.shape}"
            raise ValueError(f"{name} must have shape {shape} for {given}, got {array.shape}")
