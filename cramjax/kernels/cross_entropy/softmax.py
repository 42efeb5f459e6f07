"""The loss of rows of logits and its gradient, taken together: one function, several implementations."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cramjax.kernels import rows
from cramjax.kernels.choice import Implementation, choose, never
from cramjax.kernels.cross_entropy import softmax_pallas


class SoftmaxRule(NamedTuple):
    """What is static about the loss of a row."""

    softcap: float | None
    """Squashes the logits into ±softcap."""
    z_loss: float
    """Weight of the squared log-partition."""
    vocab_size: int
    """Columns from this one on are padding and get no probability."""


class RowLosses(NamedTuple):
    """What a head says about each token."""

    nll: Float[Array, " tokens"]
    """Negative log-likelihood in nats."""
    log_partition: Float[Array, " tokens"]
    correct: Float[Array, " tokens"]
    """1 where no other token has a greater logit, else 0. Where rounding has made several the greatest, as of logits
    in bfloat16, each of them is right by its share: with n of them, 1/n."""


def softmax_loss(
    rule: SoftmaxRule,
    logits: Float[Array, "tokens vocab"],
    bias: Float[Array, " vocab"] | None,
    targets: Int[Array, " tokens"],
    token_weights: Float[Array, " tokens"],
    implementation: str | None = None,
) -> tuple[RowLosses, Float[Array, "tokens vocab"]]:
    """Each token's loss, and the gradient of the weighted sum by the logits, which may take their memory.

    Args:
        rule: soft-cap, z-loss and padding.
        logits: before bias and soft-cap (tokens, vocab).
        bias: added to every row (vocab,).
        targets: true token ids (tokens,).
        token_weights: of each token in the sum (tokens,).
        implementation: one of `IMPLEMENTATIONS`, by name. Default: the first that can run.

    Returns:
        The losses, and their gradient in the precision of the logits. It is not differentiable itself.

    Raises:
        ConfigError: the implementation asked for does not exist or cannot run here.
    """
    chosen = choose("softmax", IMPLEMENTATIONS, implementation, logits)
    *losses, gradient = chosen.compute(rule, logits, bias, targets, token_weights)
    return RowLosses(*losses), gradient


def row_losses(
    rule: SoftmaxRule,
    logits: Float[Array, "tokens vocab"],
    bias: Float[Array, " vocab"] | None,
    targets: Int[Array, " tokens"],
) -> RowLosses:
    """Each token's loss alone, in plain operations; arguments as of `softmax_loss`."""
    return _losses(rule, _squashed(rule, logits, bias), targets)


def _xla(rule: SoftmaxRule, logits: Array, bias: Array | None, targets: Array, token_weights: Array) -> Any:
    squashed = _squashed(rule, logits, bias)
    losses = _losses(rule, squashed, targets, rounded=logits.dtype != jnp.float32)
    columns = jnp.arange(logits.shape[1])
    share = token_weights * (1 + 2 * rule.z_loss * losses.log_partition)
    # Exponentials are taken a second time rather than kept: that costs less than an array as large as the logits.
    gradient = jnp.exp(_padded(rule, squashed) - losses.log_partition[:, None]) * share[:, None]
    gradient = gradient - jnp.where(columns == targets[:, None], token_weights[:, None], 0)
    if rule.softcap is not None:
        gradient = gradient * (1 - jnp.square(squashed / rule.softcap))
    return *losses, gradient.astype(logits.dtype)


def _squashed(rule: SoftmaxRule, logits: Array, bias: Array | None) -> Float[Array, "tokens vocab"]:
    logits = logits.astype(jnp.float32)
    if bias is not None:
        logits = logits + bias
    return logits if rule.softcap is None else rule.softcap * jnp.tanh(logits / rule.softcap)


def _padded(rule: SoftmaxRule, logits: Array) -> Float[Array, "tokens vocab"]:
    if rule.vocab_size == logits.shape[1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[1]) < rule.vocab_size, logits, -jnp.inf)


def _losses(rule: SoftmaxRule, logits: Array, targets: Array, *, rounded: bool = False) -> RowLosses:
    logits = _padded(rule, logits)
    greatest = jnp.max(logits, axis=-1)
    log_partition = greatest + jnp.log(jnp.sum(jnp.exp(logits - greatest[:, None]), axis=-1))
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")[:, 0]
    correct = (target >= greatest).astype(jnp.float32)
    if rounded:
        correct = correct / jnp.sum(logits == greatest[:, None], axis=-1)
    return RowLosses(log_partition - target, log_partition, correct)


def _pallas_refusal(logits: Array) -> str | None:
    return rows.refusal(logits, 1)  # of a row it holds a part at a time


IMPLEMENTATIONS = (
    Implementation("pallas", softmax_pallas.softmax_loss, _pallas_refusal),
    Implementation("xla", _xla, never),
)
