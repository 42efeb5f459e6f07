"""The walk over a stack with caches: text continued token by token.

`decode` holds all parameters. A walk that holds one block's at a time is `begin`, `Stack.decode_block` for each step,
and `finish`.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from cramjax.errors import ConfigError
from cramjax.kernels.packed import Streamed, is_packed, prompt_of, unpacked
from cramjax.model import in_one_call
from cramjax.model.cache import Cache, Contiguous, Places, Ring
from cramjax.model.layers import Context
from cramjax.model.stack import Stack, unstack, virtual_tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextCache:
    """What is known of some rows of text: the caches of all blocks, and what the embedding looks back at."""

    blocks: tuple[Cache, ...]
    """Of each block of a period, stacked over the repeats."""
    segment_ids: Any
    """Document of every token, int32 (batch, length)."""
    segment: Any
    """Document of the last token, int32 (batch,)."""
    last: Any
    """The last token, int32 (batch,); -1: none."""
    length: Any
    """Tokens of each row, int32 (batch,); those of a prompt are counted."""
    prompt: int = field(default=0, metadata={"static": True})
    """Virtual tokens of a prompt that every row begins with."""

    @property
    def capacity(self) -> int:
        """Most tokens that a row can hold."""
        return self.segment_ids.shape[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Begun:
    """A walk between its beginning and its end."""

    context: Context
    tokens: Int[Array, "batch seq"]
    counts: Int[Array, " batch"]
    segments: Int[Array, "batch seq"]
    kv_segments: Int[Array, "batch length"]
    missing: Bool[Array, "batch seq"]
    """Tokens for which the caches have no place."""


def init_cache(stack: Stack, batch: int, length: int, params: PyTree | None = None) -> TextCache:
    """An empty cache, but for a prompt. Blocks with a window hold no more tokens than it is long.

    Args:
        stack: the model.
        batch: rows.
        length: most tokens a row can hold, beside virtual ones.
        params: all parameters, needed where they have virtual tokens.

    Raises:
        ConfigError: the model is not causal, or has fewer positions than `length`.
    """
    sizes = stack.sizes
    if not stack.causal:
        raise ConfigError("Only causal models decode token by token; this model was trained on masked tokens.")
    virtual = 0 if params is None else virtual_tokens(params)
    stack.check_length(length + virtual, "prompt and continuation together")
    prompt = None if params is None else prompt_of(params["embed"]["token"]["table"])
    length += 0 if prompt is None else virtual

    def block(window: int | None) -> Cache:
        kind, places = (Contiguous, length) if window is None or window >= length else (Ring, window)
        shape = stack.repeats, batch, places, sizes.kv_heads, sizes.head_dim
        return kind.empty(shape, stack.compute_dtype)

    cache = TextCache(
        blocks=tuple(block(layer.window) for layer in stack.period),
        segment_ids=jnp.zeros((batch, length), jnp.int32),
        segment=jnp.zeros(batch, jnp.int32),
        last=jnp.full(batch, -1, jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
    )
    return cache if prompt is None else prompted(stack, params, cache)


def prompted(stack: Stack, params: PyTree, cache: TextCache) -> TextCache:
    """An empty cache with a prompt of virtual tokens in it.

    Args:
        stack: the model.
        params: all parameters, with a prompt.
        cache: with nothing in it.
    """
    batch = len(cache.length)
    x, context = stack.prompt(params, batch)
    places = Places(cache.length, jnp.ones(x.shape[:2], bool))
    if stack.config.mask_documents:
        segments = jnp.zeros(x.shape[:2], jnp.int32)
        places = replace(places, segment_ids=segments, kv_segment_ids=cache.segment_ids)
    _, blocks = _through(stack, params, replace(context, places=places), x, cache.blocks)
    return replace(cache, blocks=blocks, length=cache.length + x.shape[1], prompt=x.shape[1])


def decode(
    stack: Stack,
    params: PyTree,
    cache: TextCache,
    tokens: Int[Array, "batch seq"],
    counts: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch seq embed"], TextCache]:
    """Continue each row of a cache by some tokens.

    Args:
        stack: the model.
        params: all parameters.
        cache: from `init_cache` or an earlier call.
        tokens: the next tokens of each row (batch, n).
        counts: how many of the n are real in each row; the rest, at the end, is padding. Default: all.

    Returns:
        What the decoder reads for each token (batch, n, embed), and the new cache. A token for which the cache has no
        place, and every later one of its row, gives NaN.

    Raises:
        ConfigError: more tokens than the cache has places.
    """
    x, begun = begin(stack, params, cache, tokens, counts)
    return finish(stack, params, cache, begun, *_through(stack, params, begun.context, x, cache.blocks))


def _through(
    stack: Stack, params: PyTree, context: Context, x: Float[Array, "batch seq embed"], caches: tuple[Cache, ...]
) -> tuple[Float[Array, "batch seq embed"], tuple[Cache, ...]]:
    """All blocks in turn."""
    if (made := in_one_call.through(stack, params, context, x, caches)) is not None:
        return made
    carry: Any = x, caches

    def step(carry: Any, item: tuple[PyTree, Any]) -> tuple[Any, None]:
        return stack.decode_block(item[0], carry[0], context, item[1], carry[1]), None

    cut, in_place = _apart(params["blocks"])
    if stack.unroll:
        for repeat, block_params in enumerate(unstack(cut, stack.repeats)):
            carry, _ = step(carry, (_joined(block_params, in_place, repeat), repeat))
    else:

        def scanned(carry: Any, item: tuple[PyTree, Array]) -> tuple[Any, None]:
            return step(carry, (_joined(item[0], in_place, item[1]), item[1]))

        carry, _ = jax.lax.scan(scanned, carry, (cut, jnp.arange(stack.repeats)))
    return carry


def _apart(blocks: PyTree) -> tuple[PyTree, PyTree]:
    """The stacked parameters that a walk cuts a step's out of, and those that are read where they are."""

    def only(in_place: bool) -> PyTree:
        return jax.tree.map(lambda p: p if isinstance(p, Streamed) == in_place else None, blocks, is_leaf=is_packed)

    return only(False), only(True)


def _joined(cut: PyTree, in_place: PyTree, repeat: int | Array) -> PyTree:
    """A step's parameters, of both kinds."""

    def own(part: Any, whole: Any) -> Any:
        return part if whole is None else whole.at(repeat)

    return jax.tree.map(own, cut, in_place, is_leaf=lambda leaf: leaf is None or is_packed(leaf))


def begin(
    stack: Stack,
    params: PyTree,
    cache: TextCache,
    tokens: Int[Array, "batch seq"],
    counts: Int[Array, " batch"] | None = None,
    rows: Float[Array, "batch seq embed"] | None = None,
) -> tuple[Float[Array, "batch seq embed"], Begun]:
    """The start of `decode`: the residual stream of the new tokens, and what else the walk reads.

    Args:
        stack: the model.
        params: of which `embed` is read.
        cache: as of `decode`.
        tokens: as of `decode`.
        counts: as of `decode`.
        rows: the token table's rows of the tokens. Default: looked up.
    """
    batch, count = tokens.shape
    if count > cache.capacity:
        raise ConfigError(f"The cache has places for {cache.capacity} tokens, got {count}: make a longer one.")
    counts = jnp.full(batch, count, jnp.int32) if counts is None else counts
    real = jnp.arange(count) < counts[:, None]
    positions = cache.length[:, None] + jnp.arange(count)
    held = real & (positions < cache.capacity)
    segments = cache.segment[:, None] + stack.segment_ids(tokens)
    at = jnp.arange(batch)[:, None], jnp.where(held, positions, cache.capacity)
    kv_segments = cache.segment_ids.at[at].set(segments, mode="drop")
    where = jnp.where(held, positions, 0)
    if (prompt := prompt_of(params["embed"]["token"]["table"])) is not None:
        if cache.prompt != len(prompt):
            raise ValueError("the cache holds no prompt, and the parameters have one: give them to init_cache")
        table = unpacked(params["embed"]["token"]["table"])  # the prompt is in the cache, and counted in positions
        params = {**params, "embed": {**params["embed"], "token": {"table": table}}}
    x, context = stack.embed(params, tokens, positions=where, previous=cache.last, segment_ids=segments, rows=rows)
    places = Places(cache.length, held, by_kernel=stack.cached_by_kernel)
    if stack.config.mask_documents:
        places = replace(places, segment_ids=segments, kv_segment_ids=kv_segments)
    context = replace(context, segment_ids=None, places=places, shared=context.shared or cache.prompt)
    return x, Begun(context, tokens, counts, segments, kv_segments, real & ~held)


def finish(
    stack: Stack,
    params: PyTree,
    cache: TextCache,
    begun: Begun,
    x: Float[Array, "batch seq embed"],
    blocks: tuple[Cache, ...],
) -> tuple[Float[Array, "batch seq embed"], TextCache]:
    """The end of `decode`.

    Args:
        stack: the model.
        params: of which `head` is read.
        cache: that `begin` was given.
        begun: from `begin`.
        x: after the last block.
        blocks: caches after the last block.
    """
    hidden = jnp.where(begun.missing[..., None], jnp.nan, stack.head(params, x))
    return hidden, grown(cache, begun, blocks)


def grown(cache: TextCache, begun: Begun, blocks: tuple[Cache, ...]) -> TextCache:
    """A cache after the tokens of a walk that has begun, with the caches of its blocks."""
    rows, final, grew = jnp.arange(len(begun.tokens)), jnp.maximum(begun.counts - 1, 0), begun.counts > 0
    return TextCache(
        blocks=blocks,
        segment_ids=begun.kv_segments,
        segment=jnp.where(grew, begun.segments[rows, final], cache.segment),
        last=jnp.where(grew, begun.tokens[rows, final], cache.last),
        length=cache.length + begun.counts,
        prompt=cache.prompt,
    )
