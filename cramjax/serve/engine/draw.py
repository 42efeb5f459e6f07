"""Tokens from logits, for rows that each want them drawn in another way: the ways are arrays, so nothing recompiles."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from cramjax.kernels.largest import largest, likeliest
from cramjax.serve.request import SamplingParameters

_FEW = 64
"""Tokens among which the last one that top-k or top-p keeps is looked for first."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ways:
    """How the rows of a batch want their tokens drawn: `SamplingParameters`, an array a field, each (batch,)."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    history: Any
    """Whether what a row holds, or a bias, changes its logits."""
    seed: Any
    """Two halves of it, uint32 (batch, 2)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """What penalties and biases read, of each slot."""

    prompt: Any
    """Whether the prompt holds a token, bool (slots, vocab)."""
    drawn: Any
    """How often it was drawn, int32 (slots, vocab)."""
    bias: Any
    """Added to its logit, float32 (slots, vocab)."""

    @classmethod
    def empty(cls, slots: int, vocab: int) -> "History":
        """Of slots where nothing has happened."""
        shape = slots, vocab
        return cls(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))

    def begun(self, slot: Array, prompt: Array, drawn: Array, biased: Array, bias: Array) -> "History":
        """A slot begins with these tokens (those out of range are none) and these biases."""
        return History(
            self.prompt.at[slot].set(False).at[slot, prompt].set(True, mode="drop"),
            self.drawn.at[slot].set(0).at[slot, drawn].add(1, mode="drop"),
            self.bias.at[slot].set(0.0).at[slot, biased].set(bias, mode="drop"),
        )


def needs_history(sampling: SamplingParameters) -> bool:
    """Whether logits depend on what was drawn, or on a bias."""
    neutral = sampling.repetition_penalty == 1.0 and sampling.presence_penalty == 0.0 == sampling.frequency_penalty
    return not neutral or bool(sampling.logit_bias)


def ways(parameters: Sequence[SamplingParameters], rows: int) -> Ways:
    """Of the rows of a batch; rows that are nobody's, at the end, are greedy."""
    padded = [*parameters, *[SamplingParameters(temperature=0.0)] * (rows - len(parameters))]

    def array(name: str, kind: Any) -> np.ndarray:
        return np.array([getattr(each, name) for each in padded], kind)

    floats = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    return Ways(
        **{name: array(name, np.float32) for name in floats},
        top_k=array("top_k", np.int32),
        history=np.array([needs_history(each) for each in padded]),
        seed=np.array([[each.seed & 0xFFFFFFFF, (each.seed >> 32) & 0xFFFFFFFF] for each in padded], np.uint32),
    )


def draw(
    logits: Float[Array, "batch vocab"],
    ways: Ways,
    history: History,
    slots: Int[Array, " batch"],
    numbers: Int[Array, " batch"],
) -> Int[Array, " batch"]:
    """One token for each row.

    Args:
        logits: of the rows, with those of tokens never to be drawn at minus infinity.
        ways: how each wants its tokens.
        history: of the slots.
        slots: that of each row.
        numbers: how many tokens each row has drawn before: with the seed, they decide the draw.
    """
    logits = jax.lax.cond(jnp.any(ways.history), _with_history, lambda x, *_: x, logits, ways, history, slots)
    greedy = likeliest(logits)

    def drawn(logits: Array) -> Array:
        scaled = logits / jnp.where(ways.temperature > 0, ways.temperature, 1.0)[:, None]
        narrow = jnp.any((ways.top_k > 0) | (ways.top_p < 1) | (ways.min_p > 0))
        scaled = jax.lax.cond(narrow, narrowed, lambda x, *_: x, scaled, ways.top_k, ways.top_p, ways.min_p)
        return jax.vmap(jax.random.categorical)(_keys(ways.seed, numbers), scaled).astype(jnp.int32)

    sampled = jax.lax.cond(jnp.any(ways.temperature > 0), drawn, lambda _: greedy, logits)
    return jnp.where(ways.temperature > 0, sampled, greedy)


def narrowed(
    logits: Float[Array, "batch vocab"],
    top_k: Int[Array, " batch"],
    top_p: Float[Array, " batch"],
    min_p: Float[Array, " batch"],
) -> Float[Array, "batch vocab"]:
    """Logits with the tokens that top-k, then top-p, then min-p exclude at minus infinity.

    Tokens that tie with the last one kept are kept. The least logit kept is looked for among the largest few of each
    row; where that of a row is not one of them, bit by bit.

    Args:
        logits: after temperature.
        top_k: tokens kept; 0: all.
        top_p: probability that those kept reach together; 1: all.
        min_p: least probability kept, as a share of the largest.
    """
    count = min(_FEW, logits.shape[-1])
    # XLA sorts the whole row where it sees that only some of these are read.
    few = jax.lax.optimization_barrier(largest(logits, count)[0])
    kth = jnp.take_along_axis(few, jnp.clip(top_k - 1, 0, count - 1)[:, None], axis=-1)
    kth = jnp.where((top_k == 0)[:, None], -jnp.inf, kth)
    weights = jnp.exp(jnp.where(few >= kth, few, -jnp.inf) - few[:, :1])
    whole = jnp.sum(jnp.exp(logits - few[:, :1]), axis=-1, where=logits >= kth)
    reached = jnp.cumsum(weights, axis=-1) >= (top_p * whole)[:, None]
    found = (top_k <= count) & ((top_p >= 1) | reached.any(axis=-1))

    def by_few(logits: Array) -> Array:
        least = jnp.take_along_axis(few, jnp.argmax(reached, axis=-1)[:, None], axis=-1)
        least = jnp.where((top_p >= 1)[:, None], kth, jnp.maximum(kth, least))
        return jnp.where(logits >= least, logits, -jnp.inf)

    def by_bits(logits: Array) -> Array:
        order = _ordered(logits)
        least = _least(order, jnp.ones_like(logits), top_k.astype(jnp.float32))
        kept = jnp.where((order >= least[:, None]) | (top_k == 0)[:, None], logits, -jnp.inf)
        least = _least(order, jax.nn.softmax(kept, axis=-1), top_p)
        return jnp.where((order >= least[:, None]) | (top_p >= 1)[:, None], kept, -jnp.inf)

    logits = jax.lax.cond(jnp.all(found), by_few, by_bits, logits)
    return jnp.where(logits >= few[:, :1] + jnp.log(min_p)[:, None], logits, -jnp.inf)


def _with_history(logits: Array, ways: Ways, history: History, slots: Array) -> Array:
    drawn = history.drawn.at[slots].get(mode="clip")
    held = history.prompt.at[slots].get(mode="clip") | (drawn > 0)
    repetition = ways.repetition_penalty[:, None]
    penalised = jnp.where(held, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    penalised -= ways.frequency_penalty[:, None] * drawn + ways.presence_penalty[:, None] * (drawn > 0)
    penalised += history.bias.at[slots].get(mode="clip")
    return jnp.where(ways.history[:, None], penalised, logits)


def _keys(seeds: UInt[Array, "batch 2"], numbers: Int[Array, " batch"]) -> Array:
    def key(seed: Array, number: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), number)

    return jax.vmap(key)(seeds, numbers)


def _ordered(x: Float[Array, "batch vocab"]) -> UInt[Array, "batch vocab"]:
    """Whole numbers in the order of float32 ones."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign != 0, ~bits, bits | sign)


def _least(
    order: UInt[Array, "batch vocab"], weights: Float[Array, "batch vocab"], needed: Float[Array, " batch"]
) -> UInt[Array, " batch"]:
    """The largest value for which the weights of all that is not below it sum to what is needed."""

    def bit(number: Array, least: Array) -> Array:
        tried = least | (jnp.uint32(1 << 31) >> number.astype(jnp.uint32))
        reached: Bool[Array, " batch"] = jnp.sum(weights, axis=-1, where=order >= tried[:, None]) >= needed
        return jnp.where(reached, tried, least)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(len(order), jnp.uint32))
