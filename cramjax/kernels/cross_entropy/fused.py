"""Cross entropy whose gradient is taken in the forward pass, a chunk of tokens at a time: logits are never kept.

Weighted losses are summed here, so the cotangent is one scalar and the backward pass only multiplies by it. It is plain
XLA on GPUs too: a step's memory is at its peak elsewhere, whatever a chunk holds, so a kernel that never writes logits
would save next to nothing (benchmarks/LOG.md, 2026-11-24).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cramjax import devices

# Bytes of float32 logits held at once: what fits a CPU's last-level cache, and what keeps a GPU's products large.
_CHUNK_BYTES = {"cpu": 16 << 20, "gpu": 256 << 20}


class WeightedLoss(NamedTuple):
    """Sums over weighted tokens, and which tokens were right; only `total` is differentiable."""

    total: Float[Array, ""]
    nll: Float[Array, ""]
    penalty: Float[Array, ""]
    correct: Float[Array, " tokens"]
    """1 where no other token has a greater logit, else 0."""


class _Options(NamedTuple):
    softcap: float | None
    z_loss: float
    vocab_size: int


class _Gradients(NamedTuple):
    hidden: Float[Array, "tokens embed"]
    weight: Float[Array, "embed vocab"]
    bias: Float[Array, " vocab"] | None


def weighted_loss(
    hidden: Float[Array, "tokens embed"],
    weight: Float[Array, "embed vocab"],
    targets: Int[Array, " tokens"],
    token_weights: Float[Array, " tokens"],
    bias: Float[Array, " vocab"] | None = None,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> WeightedLoss:
    """Cross entropy summed over weighted tokens; arguments as of `cross_entropy_sum`."""
    options = _Options(softcap, z_loss, weight.shape[1] if vocab_size is None else vocab_size)
    return _weighted_loss(options, hidden, weight, targets, token_weights, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_loss(
    options: _Options, hidden: Array, weight: Array, targets: Array, token_weights: Array, bias: Array | None
) -> WeightedLoss:
    def loss(hidden: Array, targets: Array, token_weights: Array) -> tuple[WeightedLoss, None]:
        return _softmax(options, hidden, weight, targets, token_weights, bias).loss, None

    return _over_chunks(loss, hidden, weight, targets, token_weights)[0]


def _forward(
    options: _Options, hidden: Array, weight: Array, targets: Array, token_weights: Array, bias: Array | None
) -> tuple[WeightedLoss, _Gradients]:
    def loss(hidden: Array, targets: Array, token_weights: Array) -> tuple[WeightedLoss, _Gradients]:
        softmax = _softmax(options, hidden, weight, targets, token_weights, bias)
        return softmax.loss, _gradients(softmax, hidden, weight, targets, token_weights, bias)

    return _over_chunks(loss, hidden, weight, targets, token_weights)


def _backward(options: _Options, gradients: _Gradients, cotangent: WeightedLoss) -> tuple[Any, ...]:
    scaled = jax.tree.map(lambda g: g * cotangent.total.astype(g.dtype), gradients)
    return scaled.hidden, scaled.weight, None, None, scaled.bias


_weighted_loss.defvjp(_forward, _backward)


class _Softmax(NamedTuple):
    loss: WeightedLoss
    powers: Float[Array, "tokens vocab"]
    """exp(logit - greatest logit)."""
    share: Float[Array, " tokens"]
    """What `powers` are multiplied by to give the gradient with respect to the logits, apart from the target's."""
    slope: Float[Array, "tokens vocab"] | None
    """Derivative of the soft-cap."""


def _softmax(
    options: _Options, hidden: Array, weight: Array, targets: Array, token_weights: Array, bias: Array | None
) -> _Softmax:
    logits = jnp.matmul(hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    slope = None
    if options.softcap is not None:
        squashed = jnp.tanh(logits / options.softcap)
        logits, slope = options.softcap * squashed, 1 - jnp.square(squashed)
    if options.vocab_size < weight.shape[1]:
        logits = jnp.where(jnp.arange(weight.shape[1]) < options.vocab_size, logits, -jnp.inf)
    greatest = jnp.max(logits, axis=-1)
    powers = jnp.exp(logits - greatest[:, None])
    total = jnp.sum(powers, axis=-1)
    log_partition = greatest + jnp.log(total)
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")[:, 0]
    nll = jnp.sum((log_partition - target) * token_weights)
    penalty = options.z_loss * jnp.sum(jnp.square(log_partition) * token_weights)
    correct = (target >= greatest).astype(jnp.float32)
    share = token_weights * (1 + 2 * options.z_loss * log_partition) / total
    return _Softmax(WeightedLoss(nll + penalty, nll, penalty, correct), powers, share, slope)


def _gradients(
    softmax: _Softmax, hidden: Array, weight: Array, targets: Array, token_weights: Array, bias: Array | None
) -> _Gradients:
    dtype = hidden.dtype
    weight_t = weight.T.astype(dtype)

    def product(a: Array, b: Array) -> Array:
        return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)

    if softmax.slope is not None:
        logits = softmax.powers * softmax.share[:, None]
        logits = logits - jnp.where(jnp.arange(weight.shape[1]) == targets[:, None], token_weights[:, None], 0)
        logits = logits * softmax.slope
        by_bias = None if bias is None else jnp.sum(logits, axis=0)
        return _Gradients(product(logits, weight_t).astype(dtype), product(hidden.T, logits), by_bias)
    # The normaliser is applied to the narrow side of each product, and the targets' terms are added to a few rows, so
    # that no second array as large as the logits is written.
    share, weights = softmax.share[:, None], token_weights[:, None]
    by_hidden = product(softmax.powers, weight_t) * share - weight_t[targets] * weights
    at_targets = jnp.zeros(weight.shape[::-1], jnp.float32).at[targets].add(hidden * weights, mode="clip")
    by_weight = product((hidden * share).T, softmax.powers) - at_targets.T
    by_bias = None
    if bias is not None:
        by_bias = (softmax.share @ softmax.powers).at[targets].add(-token_weights, mode="clip")
    return _Gradients(by_hidden.astype(dtype), by_weight, by_bias)


def _over_chunks(
    loss: Any, hidden: Array, weight: Array, targets: Array, token_weights: Array
) -> tuple[WeightedLoss, Any]:
    """Call `loss` on chunks of the tokens: sums and gradients of weights add up, what is per token is put together."""
    count = chunk_count(len(targets), weight.shape[1])
    if count == 1:
        return loss(hidden, targets, token_weights)

    # Chunk i holds tokens i, i + count, …: the tokens' sharding over devices stays on the axis that remains.
    def split(x: Array) -> Array:
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    def join(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def step(sums: Any, chunk: Any) -> tuple[Any, Any]:
        losses, gradients = loss(*chunk)
        summed = (losses._replace(correct=None), None if gradients is None else gradients._replace(hidden=None))
        return jax.tree.map(jnp.add, sums, summed), (losses.correct, None if gradients is None else gradients.hidden)

    chunks = (split(hidden), split(targets), split(token_weights))
    shapes = jax.eval_shape(loss, *(x[0] for x in chunks))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums = (zeros[0]._replace(correct=None), None if zeros[1] is None else zeros[1]._replace(hidden=None))
    (losses, gradients), (correct, by_hidden) = jax.lax.scan(step, sums, chunks)
    losses = losses._replace(correct=join(correct))
    return losses, None if gradients is None else gradients._replace(hidden=join(by_hidden))


def chunk_count(tokens: int, vocab: int) -> int:
    """Chunks that the tokens are cut into: as few as keep a chunk's logits small, and dividing the tokens evenly.

    Args:
        tokens: rows of the logits.
        vocab: columns of the logits.
    """
    limit = _CHUNK_BYTES.get(devices.target().platform, _CHUNK_BYTES["gpu"])
    least = -(-4 * tokens * vocab // limit)
    # A number of tokens with no divisor near is done at once.
    return next((count for count in range(least, min(4 * least, tokens) + 1) if tokens % count == 0), 1)
