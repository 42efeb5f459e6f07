"""Adaptive softmax: a short head for frequent tokens, and narrow tails for rare ones that few tokens pay for.

Grave et al. 2017, "Efficient softmax approximation for GPUs" (arXiv:1609.04309): a proper distribution over the whole
vocabulary, p(token) = p(cluster) · p(token | cluster), at a fraction of a full head's products.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cramjax.kernels.cross_entropy.api import CrossEntropySums
from cramjax.kernels.cross_entropy.fused import weighted_loss
from cramjax.kernels.cross_entropy.reference import head_logits
from cramjax.kernels.dense import dense


def tail_shares(tails: int) -> tuple[float, ...]:
    """Share of a batch's tokens that each tail has room for: 1/4 in the first, 1/8 in the others.

    A batch with more of a tail's tokens computes that tail on all its tokens: slower, the same result.
    """
    return (0.25, *[0.125] * (tails - 1))[:tails]


class Tail(NamedTuple):
    """One cluster of rare tokens: a projection to a narrower space and its own head."""

    down: Float[Array, "embed narrow"]
    weight: Float[Array, "narrow size"]


def adaptive_cross_entropy_sum(
    hidden: Float[Array, "tokens embed"],
    weight: Float[Array, "embed short"],
    targets: Int[Array, " tokens"],
    token_weights: Float[Array, " tokens"] | None = None,
    *,
    tails: Sequence[Tail],
    softcap: float | None = None,
    z_loss: float = 0.0,
    vocab_size: int,
) -> CrossEntropySums:
    """Summed cross entropy under an adaptive softmax.

    `correct` counts tokens whose cluster and whose place in it are both the likeliest, which is almost always, but
    not always, the likeliest token.

    Args:
        hidden: inputs of the head (tokens, embed).
        weight: the short head (embed, short); its last `len(tails)` columns stand for the tails.
        targets: true token ids (tokens,); the short head has the first, the tails follow in order.
        token_weights: weight of each token in the sums (tokens,). Default: 1.
        tails: clusters of rare tokens, commonest first.
        softcap: squashes every head's logits into ±softcap.
        z_loss: weight of the squared log-partition, of every head.
        vocab_size: tokens from this one on are padding and get no probability.
    """
    start = weight.shape[1] - len(tails)
    weights = jnp.ones(targets.shape, jnp.float32) if token_weights is None else token_weights
    clusters, bounds = targets, []
    for index, tail in enumerate(tails):
        inside = (targets >= start) & (targets < start + tail.weight.shape[1])
        clusters = jnp.where(inside, weight.shape[1] - len(tails) + index, clusters)
        bounds.append((start, inside))
        start += tail.weight.shape[1]
    head = weighted_loss(hidden, weight, clusters, token_weights, softcap=softcap, z_loss=z_loss)
    total, nll, penalty, found = head.total, head.nll, head.penalty, head.correct > 0
    in_short = targets < bounds[0][0]
    correct = jnp.sum(found & in_short, where=weights > 0, dtype=jnp.float32)

    for tail, (first, inside), share in zip(tails, bounds, tail_shares(len(tails)), strict=True):
        room = min(len(targets), -(-int(len(targets) * share) // 8) * 8)
        shape = _TailShape(first, min(tail.weight.shape[1], vocab_size - first), room, softcap, z_loss)
        out: Any = _tail(shape, hidden, tail, targets, jnp.where(inside, weights, 0.0), inside, found)
        loss, sums = out
        total, nll, penalty, correct = total + loss, nll + sums.nll, penalty + sums.penalty, correct + sums.correct
    stop = jax.lax.stop_gradient
    return CrossEntropySums(total, stop(nll), stop(penalty), stop(correct))


class _TailShape(NamedTuple):
    """What is static about a tail's loss."""

    first: int
    """Its first token id."""
    size: int
    """Its tokens, without padding."""
    room: int
    """Tokens of a batch that it computes at least."""
    softcap: float | None
    z_loss: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tail(
    shape: _TailShape, hidden: Array, tail: Tail, targets: Array, weights: Array, inside: Array, found: Array
) -> tuple[Array, CrossEntropySums]:
    """Loss of the tokens inside a tail, differentiable in `hidden` and `tail`, and its sums; `found`: right cluster."""
    return _on_rows_inside(shape, inside, _tail_loss, hidden, tail, targets, weights, found)


def _tail_forward(
    shape: _TailShape, hidden: Array, tail: Tail, targets: Array, weights: Array, inside: Array, found: Array
) -> tuple[tuple[Array, CrossEntropySums], tuple[Array, Tail]]:
    # The gradient is taken inside the branch: residuals of two branches would both be stored, at their full size.
    differentiate = jax.value_and_grad(_tail_loss, argnums=(1, 2), has_aux=True)
    return _on_rows_inside(shape, inside, differentiate, hidden, tail, targets, weights, found)


def _tail_backward(shape: _TailShape, gradients: tuple[Array, Tail], cotangent: tuple[Array, Any]) -> tuple[Any, ...]:
    hidden, tail = jax.tree.map(lambda g: g * cotangent[0].astype(g.dtype), gradients)
    return hidden, tail, None, None, None, None


_tail.defvjp(_tail_forward, _tail_backward)


def _on_rows_inside(shape: _TailShape, inside: Array, loss: Callable[..., Any], *arguments: Any) -> Any:
    """Call a loss on the rows inside the tail if there is room for them, else on all."""
    rows = jnp.nonzero(inside, size=shape.room, fill_value=0)[0]
    count = jnp.sum(inside)
    return jax.lax.cond(
        count <= shape.room,
        lambda: loss((shape, rows, jnp.arange(shape.room) < count), *arguments),
        lambda: loss((shape, jnp.arange(len(inside)), inside), *arguments),
    )


def _tail_loss(
    where: tuple[_TailShape, Array, Array], hidden: Array, tail: Tail, targets: Array, weights: Array, found: Array
) -> tuple[Array, CrossEntropySums]:
    """Loss of some rows: those that count, of the given ones."""
    shape, rows, counted = where
    share = jnp.where(counted, weights[rows], 0.0)
    loss = weighted_loss(
        narrow(hidden[rows], tail),
        tail.weight,
        jnp.where(counted, targets[rows] - shape.first, 0),
        share,
        softcap=shape.softcap,
        z_loss=shape.z_loss,
        vocab_size=shape.size,
    )
    right = jnp.sum((loss.correct > 0) & found[rows] & (share > 0), dtype=jnp.float32)
    return loss.total, CrossEntropySums(loss.total, loss.nll, loss.penalty, right)


def adaptive_logits(
    hidden: Float[Array, "*tokens embed"],
    weight: Float[Array, "embed short"],
    *,
    tails: Sequence[Tail],
    softcap: float | None = None,
    vocab_size: int,
) -> Float[Array, "*tokens vocab"]:
    """Log-probabilities of the whole vocabulary, to use as logits; arguments as of `adaptive_cross_entropy_sum`."""
    short = weight.shape[1] - len(tails)
    head = jax.nn.log_softmax(head_logits(hidden, weight, softcap=softcap))
    parts, first = [head[..., :short]], short
    for index, tail in enumerate(tails):
        size = min(tail.weight.shape[1], vocab_size - first)
        own = head_logits(narrow(hidden, tail), tail.weight, softcap=softcap, vocab_size=size)
        parts.append(head[..., short + index, None] + jax.nn.log_softmax(own))
        first += tail.weight.shape[1]
    return jnp.concatenate(parts, axis=-1)


def narrow(hidden: Float[Array, "*tokens embed"], tail: Tail) -> Float[Array, "*tokens narrow"]:
    """What a tail's head reads: projected, and normalised to a root mean square of 1."""
    y = dense(hidden, tail.down, dtype=hidden.dtype).astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)).astype(hidden.dtype)
