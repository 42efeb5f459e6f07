"""Cross entropy whose gradient is taken in the forward pass, a tile of tokens at a time: logits are never kept.

Weighted losses are summed here, so the cotangent is one scalar and the backward pass only multiplies by it. On CPUs a
tile is what fits the last-level cache, and tokens without weight, such as those that a user says, are left out tile by
tile. On GPUs it is as large as memory allows, since products over few rows are slow, and its logits have the compute
precision, as what leaves any product there; evaluation has them in float32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cramjax import devices
from cramjax.gpus import gpu_of_kind
from cramjax.kernels.cross_entropy.softmax import RowLosses, SoftmaxRule, row_losses, softmax_loss
from cramjax.kernels.dense import matmul, product, transposed
from cramjax.kernels.mesh import by_token, whole

_CPU_TILE = 32 << 20
"""Bytes of float32 logits in a tile on a CPU."""
_GPU_ROWS = 8192
"""Rows of a tile on a GPU at least, if there are so many: full-vocabulary products lose a fifth of their speed below
(marin-community/marin, issue 6596, on an H100)."""
_GPU_SHARE = 1 / 16
"""Share of a GPU's memory that a tile of logits may take."""
_UNKNOWN_GPU = 16 << 30
"""Bytes of memory that a GPU outside the table is taken to have."""


class WeightedLoss(NamedTuple):
    """Sums over weighted tokens, and which tokens were right; only `total` is differentiable."""

    total: Float[Array, ""]
    nll: Float[Array, ""]
    penalty: Float[Array, ""]
    correct: Float[Array, " tokens"]
    """1 where no other token has a greater logit, else 0."""


class _Options(NamedTuple):
    rule: SoftmaxRule
    tied: bool
    skips: bool
    """Whether weights may be 0, so that it pays to look."""


class _Gradients(NamedTuple):
    hidden: Float[Array, "tokens embed"]
    weight: Float[Array, "embed vocab"]
    bias: Float[Array, " vocab"] | None


def weighted_loss(
    hidden: Float[Array, "tokens embed"],
    weight: Float[Array, "embed vocab"],
    targets: Int[Array, " tokens"],
    token_weights: Float[Array, " tokens"] | None = None,
    bias: Float[Array, " vocab"] | None = None,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    tied: bool = False,
) -> WeightedLoss:
    """Cross entropy summed over weighted tokens; arguments as of `cross_entropy_sum`."""
    rule = SoftmaxRule(softcap, z_loss, weight.shape[1] if vocab_size is None else vocab_size)
    options = _Options(rule, tied, token_weights is not None)
    if token_weights is None:
        token_weights = jnp.ones(targets.shape, jnp.float32)
    return _weighted_loss(options, hidden, weight, targets, token_weights, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_loss(
    options: _Options, hidden: Array, weight: Array, targets: Array, token_weights: Array, bias: Array | None
) -> WeightedLoss:
    def losses(shared: tuple[Array, Array | None], tokens: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        by_embed, bias = _row_major(options, shared[0])[0], shared[1]

        def loss(hidden: Array, targets: Array, token_weights: Array) -> tuple[WeightedLoss, None]:
            each = row_losses(options.rule, matmul(hidden, by_embed), bias, targets)
            return _weighted(options.rule, each, token_weights), None

        memory = _memory()
        tiles = _weighted_tiles if options.skips and memory is None else _over_tiles
        return tiles(loss, *tokens, count=tile_count(len(tokens[0]), weight.shape[1], 4, memory))

    shared = whole(weight.astype(hidden.dtype)), bias
    return _together(*by_token(losses, shared, (hidden, targets, token_weights)))[0]


def _forward(
    options: _Options, hidden: Array, weight: Array, targets: Array, token_weights: Array, bias: Array | None
) -> tuple[WeightedLoss, _Gradients]:
    dtype, memory = hidden.dtype, _memory()

    def losses(shared: tuple[Array, Array | None], tokens: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        (by_embed, by_vocab), bias = _row_major(options, shared[0]), shared[1]

        def loss(hidden: Array, targets: Array, token_weights: Array) -> tuple[WeightedLoss, _Gradients]:
            logits = matmul(hidden, by_embed) if memory is None else product(hidden, by_embed, dtype)
            each, gradient = softmax_loss(options.rule, logits, bias, targets, token_weights)
            gradient = gradient.astype(dtype)
            gradients = _Gradients(
                product(gradient, by_vocab, dtype),
                matmul(transposed(hidden), gradient),
                None if bias is None else matmul(jnp.ones((8, len(targets)), dtype), gradient)[0],
            )
            return _weighted(options.rule, each, token_weights), gradients

        size = 4 if memory is None else dtype.itemsize
        tiles = _weighted_tiles if options.skips and memory is None else _over_tiles
        return tiles(loss, *tokens, count=tile_count(len(tokens[0]), weight.shape[1], size, memory))

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


def _weighted(rule: SoftmaxRule, each: RowLosses, token_weights: Array) -> WeightedLoss:
    """Sums over weighted tokens."""
    nll = jnp.sum(each.nll * token_weights, where=token_weights > 0)  # a token left out may have no probability
    penalty = rule.z_loss * jnp.sum(jnp.square(each.log_partition) * token_weights)
    return WeightedLoss(nll + penalty, nll, penalty, each.correct)


def _apart(losses: WeightedLoss, gradients: Any) -> tuple[Any, Any]:
    """What is summed over tokens, and what is per token."""
    sums = losses._replace(correct=None), None if gradients is None else gradients._replace(hidden=None)
    return sums, (losses.correct, None if gradients is None else gradients.hidden)


def _together(sums: Any, each: Any) -> tuple[WeightedLoss, Any]:
    """What `_apart` has taken apart."""
    (losses, gradients), (correct, by_hidden) = sums, each
    return losses._replace(correct=correct), None if gradients is None else gradients._replace(hidden=by_hidden)


def _over_tiles(loss: Any, hidden: Array, targets: Array, token_weights: Array, *, count: int) -> tuple[Any, Any]:
    """Call `loss` on tiles of the tokens: sums and gradients of weights add up, what is per token is put together."""
    if count == 1:
        return _apart(*loss(hidden, targets, token_weights))
    tokens = len(targets)
    if tokens % count:  # by tokens of weight 0
        hidden, targets, token_weights = (
            jnp.pad(x, ((0, -tokens % count), *((0, 0),) * (x.ndim - 1))) for x in (hidden, targets, token_weights)
        )

    # Tile i holds tokens i, i + count, …: the tokens' sharding over devices stays on the axis that remains.
    def split(x: Array) -> Array:
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    def join(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:tokens]

    def step(sums: Any, tile: Any) -> tuple[Any, Any]:
        summed, each = _apart(*loss(*tile))
        return jax.tree.map(jnp.add, sums, summed), each

    tiles = (split(hidden), split(targets), split(token_weights))
    shapes = jax.eval_shape(loss, *(x[0] for x in tiles))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, each = jax.lax.scan(step, _apart(*zeros)[0], tiles)
    return sums, jax.tree.map(join, each)


def _weighted_tiles(loss: Any, hidden: Array, targets: Array, token_weights: Array, *, count: int) -> tuple[Any, Any]:
    """The same of those tokens alone that have a weight: they come first, and tiles without any are not computed."""
    tokens = len(targets)
    if count == 1:
        return _over_tiles(loss, hidden, targets, token_weights, count=1)
    order = jnp.argsort(token_weights == 0, stable=True)
    padding = -tokens % count
    tiles = tuple(
        jnp.pad(x[order], ((0, padding), *((0, 0),) * (x.ndim - 1))).reshape(count, -1, *x.shape[1:])
        for x in (hidden, targets, token_weights)
    )
    shapes = _apart(*jax.eval_shape(loss, *(x[0] for x in tiles)))
    sums, each = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    each = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), each)

    def step(number: Array, carry: Any) -> Any:
        sums, each = carry
        summed, own = _apart(*loss(*(x[number] for x in tiles)))
        each = jax.tree.map(lambda x, part: x.at[number].set(part), each, own)
        return jax.tree.map(jnp.add, sums, summed), each

    size = (tokens + padding) // count
    needed = (jnp.count_nonzero(token_weights) + size - 1) // size
    sums, each = jax.lax.fori_loop(0, needed, step, (sums, each))
    places = jnp.argsort(order)
    return sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[places], each)


def tile_count(tokens: int, vocab: int, itemsize: int, memory: int | None) -> int:
    """Tiles that the tokens are cut into: as few as memory allows, dividing the tokens evenly where a number near does.

    Args:
        tokens: rows of the logits on one device.
        vocab: columns of the logits.
        itemsize: bytes of a logit.
        memory: bytes of the GPU that they are taken on; None: a CPU.
    """
    limit = _CPU_TILE if memory is None else max(int(memory * _GPU_SHARE), _GPU_ROWS * itemsize * vocab)
    least = max(1, -(-itemsize * tokens * vocab // limit))
    return next((count for count in range(least, min(4 * least, tokens) + 1) if tokens % count == 0), least)


def _memory() -> int | None:
    """Bytes of the device that is traced for; None: it is a CPU."""
    target = devices.target()
    if target.platform == "cpu":
        return None
    gpu = gpu_of_kind(target.kind)
    return _UNKNOWN_GPU if gpu is None else gpu.memory
