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
from cramjax.kernels.dense import matmul, transposed
from cramjax.kernels.mesh import by_token, whole

# Bytes of float32 logits held at once: what fits a CPU's last-level cache, and what keeps a GPU's products large.
_CHUNK_BYTES = {"cpu": 32 << 20, "gpu": 256 << 20}


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
    tied: bool


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
    tied: bool = False,
) -> WeightedLoss:
    """Cross entropy summed over weighted tokens; arguments as of `cross_entropy_sum`."""
    options = _Options(softcap, z_loss, weight.shape[1] if vocab_size is None else vocab_size, tied)
    return _weighted_loss(options, hidden, weight, targets, token_weights, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_loss(
    options: _Options, hidden: Array, weight: Array, targets: Array, token_weights: Array, bias: Array | None
) -> WeightedLoss:
    def losses(shared: tuple[Array, Array | None], tokens: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        by_embed, bias = _row_major(options, shared[0])[0], shared[1]

        def loss(hidden: Array, targets: Array, token_weights: Array) -> tuple[WeightedLoss, None]:
            return _softmax(options, _logits(options, hidden, by_embed, bias), targets, token_weights)[0], None

        return _over_chunks(loss, *tokens, vocab=weight.shape[1])

    shared = whole(weight.astype(hidden.dtype)), bias
    return _together(*by_token(losses, shared, (hidden, targets, token_weights)))[0]


def _forward(
    options: _Options, hidden: Array, weight: Array, targets: Array, token_weights: Array, bias: Array | None
) -> tuple[WeightedLoss, _Gradients]:
    dtype = hidden.dtype

    def losses(shared: tuple[Array, Array | None], tokens: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        (by_embed, by_vocab), bias = _row_major(options, shared[0]), shared[1]

        def loss(hidden: Array, targets: Array, token_weights: Array) -> tuple[WeightedLoss, _Gradients]:
            logits = _logits(options, hidden, by_embed, bias)
            losses, gradient = _softmax(options, logits, targets, token_weights)
            if options.softcap is not None:
                gradient = gradient * (1 - jnp.square(logits / options.softcap))
            gradient = gradient.astype(dtype)
            gradients = _Gradients(
                matmul(gradient, by_vocab).astype(dtype),
                matmul(transposed(hidden), gradient),
                None if bias is None else matmul(jnp.ones((8, len(targets)), dtype), gradient)[0],
            )
            return losses, gradients

        return _over_chunks(loss, *tokens, vocab=weight.shape[1])

    found = by_token(losses, (whole(weight.astype(dtype)), bias), (hidden, targets, token_weights))
    summed, gradients = _together(*found)
    by_bias = None if bias is None else gradients.bias.astype(bias.dtype)
    return summed, gradients._replace(weight=gradients.weight.astype(weight.dtype), bias=by_bias)


def _backward(options: _Options, gradients: _Gradients, cotangent: WeightedLoss) -> tuple[Any, ...]:
    scaled = jax.tree.map(lambda g: g * cotangent.total.astype(g.dtype), gradients)
    return scaled.hidden, scaled.weight, None, None, scaled.bias


_weighted_loss.defvjp(_forward, _backward)


def _row_major(options: _Options, weight: Array) -> tuple[Float[Array, "embed vocab"], Float[Array, "vocab embed"]]:
    """The weight and its transposition, of which one is in memory already and the other is a copy."""
    return (transposed(weight.T), weight.T) if options.tied else (weight, transposed(weight))


def _logits(options: _Options, hidden: Array, by_embed: Array, bias: Array | None) -> Float[Array, "tokens vocab"]:
    logits = matmul(hidden, by_embed)
    if bias is not None:
        logits = logits + bias
    return logits if options.softcap is None else options.softcap * jnp.tanh(logits / options.softcap)


def _softmax(
    options: _Options, logits: Array, targets: Array, token_weights: Array
) -> tuple[WeightedLoss, Float[Array, "tokens vocab"]]:
    """The loss, and its gradient with respect to the logits."""
    columns = jnp.arange(logits.shape[1])
    if options.vocab_size < logits.shape[1]:
        logits = jnp.where(columns < options.vocab_size, logits, -jnp.inf)
    greatest = jnp.max(logits, axis=-1)
    log_partition = greatest + jnp.log(jnp.sum(jnp.exp(logits - greatest[:, None]), axis=-1))
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")[:, 0]
    nll = jnp.sum((log_partition - target) * token_weights)
    penalty = options.z_loss * jnp.sum(jnp.square(log_partition) * token_weights)
    correct = (target >= greatest).astype(jnp.float32)
    share = token_weights * (1 + 2 * options.z_loss * log_partition)
    # Exponentials are taken a second time rather than kept: that costs less than an array as large as the logits.
    gradient = jnp.exp(logits - log_partition[:, None]) * share[:, None]
    gradient = gradient - jnp.where(columns == targets[:, None], token_weights[:, None], 0)
    return WeightedLoss(nll + penalty, nll, penalty, correct), gradient


def _apart(losses: WeightedLoss, gradients: Any) -> tuple[Any, Any]:
    """What is summed over tokens, and what is per token."""
    sums = losses._replace(correct=None), None if gradients is None else gradients._replace(hidden=None)
    return sums, (losses.correct, None if gradients is None else gradients.hidden)


def _together(sums: Any, each: Any) -> tuple[WeightedLoss, Any]:
    """What `_apart` has taken apart."""
    (losses, gradients), (correct, by_hidden) = sums, each
    return losses._replace(correct=correct), None if gradients is None else gradients._replace(hidden=by_hidden)


def _over_chunks(loss: Any, hidden: Array, targets: Array, token_weights: Array, *, vocab: int) -> tuple[Any, Any]:
    """Call `loss` on chunks of the tokens: sums and gradients of weights add up, what is per token is put together."""
    count = chunk_count(len(targets), vocab)
    if count == 1:
        return _apart(*loss(hidden, targets, token_weights))

    # Chunk i holds tokens i, i + count, …: the tokens' sharding over devices stays on the axis that remains.
    def split(x: Array) -> Array:
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    def join(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def step(sums: Any, chunk: Any) -> tuple[Any, Any]:
        summed, each = _apart(*loss(*chunk))
        return jax.tree.map(jnp.add, sums, summed), each

    chunks = (split(hidden), split(targets), split(token_weights))
    shapes = jax.eval_shape(loss, *(x[0] for x in chunks))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, each = jax.lax.scan(step, _apart(*zeros)[0], chunks)
    return sums, jax.tree.map(join, each)


def chunk_count(tokens: int, vocab: int, platform: str | None = None) -> int:
    """Chunks that the tokens are cut into: as few as keep a chunk's logits small, and dividing the tokens evenly.

    Args:
        tokens: rows of the logits.
        vocab: columns of the logits.
        platform: `cpu` or another; None: that of the devices which programs are made for.
    """
    limit = _CHUNK_BYTES.get(platform or devices.target().platform, _CHUNK_BYTES["gpu"])
    least = -(-4 * tokens * vocab // limit)
    # A number of tokens with no divisor near is done at once.
    return next((count for count in range(least, min(4 * least, tokens) + 1) if tokens % count == 0), 1)
