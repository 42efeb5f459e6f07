"""The loss of rows of logits and its gradient for NVIDIA GPUs: a program reads its row twice, and writes over it.

XLA would keep one float32 tanh or exponential of all logits for its several readers. The second reading mostly comes
from the cache: what is in flight on all multiprocessors fits it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from cramjax.kernels import rows
from cramjax.kernels.triton import LOG2E

_COLUMNS = 4096
"""Columns of a row that a program holds at once."""


def softmax_loss(
    rule: Any,
    logits: Array,
    bias: Array | None,
    targets: Array,
    token_weights: Array,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """Each token's loss, log-partition and whether it was right, and the gradient by the logits.

    Args:
        rule: a `SoftmaxRule`.
        logits: (tokens, vocab).
        bias: (vocab,).
        targets: (tokens,).
        token_weights: (tokens,).
        interpret: run the kernel as plain operations, on any device.
    """
    tokens, vocab = logits.shape
    row = pl.BlockSpec((None, vocab), lambda i: (i, 0))
    number = pl.BlockSpec((None,), lambda i: (i,))
    of_token = jax.ShapeDtypeStruct((tokens,), jnp.float32)
    outputs: Any = rows.call(
        functools.partial(_kernel, rule=rule, vocab=vocab),
        name="softmax_loss",
        interpret=interpret,
        grid=(tokens,),
        in_specs=[row, None if bias is None else pl.BlockSpec((vocab,), lambda _: (0,)), number, number],
        out_specs=[number, number, number, row],
        out_shape=[of_token, of_token, of_token, jax.ShapeDtypeStruct(logits.shape, logits.dtype)],
        input_output_aliases={0: 3},
    )(logits, bias, targets.astype(jnp.int32), token_weights.astype(jnp.float32))
    return outputs


def _kernel(
    logits_ref: Any,
    bias_ref: Any,
    target_ref: Any,
    weight_ref: Any,
    nll_ref: Any,
    log_partition_ref: Any,
    correct_ref: Any,
    gradient_ref: Any,
    *,
    rule: Any,
    vocab: int,
) -> None:
    width = min(_COLUMNS, rows.power_of_two(vocab))
    parts = pl.cdiv(vocab, width)

    def read(part: Any) -> tuple[Array, Array, Array | None, Array]:
        """Columns, their logits under the soft-cap (those of padding are lowest), the squash, and which are there."""
        place = pl.ds(part * width, width)
        columns = part * width + jnp.arange(width)
        own = rows.load(logits_ref, columns < vocab, place)
        if bias_ref is not None:
            own = own + rows.load(bias_ref, columns < vocab, place)
        own, squash = _squashed(rule, own)
        return columns, jnp.where(columns < rule.vocab_size, own, -jnp.inf), squash, columns < vocab

    target, weight = jnp.clip(target_ref[...], 0, vocab - 1), weight_ref[...]
    target_logit = logits_ref[target].astype(jnp.float32)
    if bias_ref is not None:
        target_logit = target_logit + bias_ref[target].astype(jnp.float32)
    target_logit = jnp.where(target < rule.vocab_size, _squashed(rule, target_logit)[0], -jnp.inf)

    def add(part: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, greatest = carry
        own = read(part)[1]
        new = jnp.maximum(greatest, jnp.max(own))
        shrink = jnp.exp2((greatest - new) * LOG2E)
        return total * shrink + jnp.sum(jnp.exp2((own - new) * LOG2E)), new

    total, greatest = jax.lax.fori_loop(0, parts, add, (jnp.float32(0), jnp.float32(jnp.finfo(jnp.float32).min)))
    log_partition = greatest + jnp.log2(total) / LOG2E
    nll_ref[...] = log_partition - target_logit
    log_partition_ref[...] = log_partition
    share = weight * (1 + 2 * rule.z_loss * log_partition)

    def write(part: Any, greatest_ones: Array) -> Array:
        columns, own, squash, there = read(part)
        gradient = jnp.exp2((own - log_partition) * LOG2E) * share - jnp.where(columns == target, weight, 0)
        if squash is not None:
            gradient = gradient * (1 - squash * squash)
        rows.store(gradient_ref, gradient, there, pl.ds(part * width, width))
        return greatest_ones + jnp.sum((own >= greatest).astype(jnp.float32))

    greatest_ones = jax.lax.fori_loop(0, parts, write, jnp.float32(0))
    share_of_ties = 1.0 if logits_ref.dtype == jnp.float32 else 1 / greatest_ones
    correct_ref[...] = (target_logit >= greatest).astype(jnp.float32) * share_of_ties


def _squashed(rule: Any, logits: Array) -> tuple[Array, Array | None]:
    """Logits under the soft-cap, and their hyperbolic tangent: of an exponential and a division, which are cheaper
    than the library's, and right to float32's rounding of 1.
    """
    if rule.softcap is None:
        return logits, None
    squash = 1 - 2 / (jnp.exp2(logits * (2 * LOG2E / rule.softcap)) + 1)
    return rule.softcap * squash, squash
