"""The walk with caches where a kernel for CPUs takes a few new tokens through the whole stack in one call.

`cramjax.model.decode` asks for it; whatever stack the kernel does not know is walked block by block.
"""

import functools
import logging
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cramjax.kernels.packed import Quantised, Streamed
from cramjax.kernels.walk import ACTIVATIONS, MOST_TOKENS, Layers, Matrix, Rule, refusal, walk
from cramjax.model.cache import Cache
from cramjax.model.coded_pages import CodedPages
from cramjax.model.layers import Context
from cramjax.model.stack import Stack

_log = logging.getLogger(__name__)


def through(
    stack: Stack, params: PyTree, context: Context, x: Float[Array, "batch seq embed"], caches: tuple[Cache, ...]
) -> tuple[Float[Array, "batch seq embed"], tuple[Cache, ...]] | None:
    """All blocks in turn; None, where the walk is to go block by block. Why a model's does is said once.

    Args:
        stack: the model.
        params: of which `blocks` is read.
        context: from `cramjax.model.decode.begin`.
        x: residual stream of the new tokens.
        caches: of the blocks.
    """
    places = context.places
    if places is None or not places.by_kernel or x.shape[0] * x.shape[1] > MOST_TOKENS:
        return None
    if (reason := _unknown(stack, params["blocks"], context, caches) or refusal()) is not None:
        _say_slow(reason)
        return None
    batch, count, width = x.shape
    (cache,) = caches
    table = cache.pages(batch)
    assert table is not None, "known"
    rotary = None
    if context.rotary:
        cos, sin = (jnp.broadcast_to(part, (batch, *part.shape[1:])) for part in context.rotary[0])
        rotary = cos.reshape(batch * count, -1), sin.reshape(batch * count, -1)
    made, keys, values = walk(
        x.reshape(batch * count, width),
        _layers(params["blocks"]),
        _rule(stack),
        rotary,
        cache.keys,
        cache.values,
        jnp.repeat(table, count, axis=0),
        places.lengths.reshape(-1),
        apart=count > 1,
    )
    return made.reshape(x.shape).astype(x.dtype), (cache.with_pages(keys, values),)


@functools.cache
def _say_slow(reason: str) -> None:
    _log.info("A token's step goes block by block, not through the stack in one call, because %s.", reason)


def _unknown(stack: Stack, blocks: PyTree, context: Context, caches: tuple[Cache, ...]) -> str | None:
    """Why the kernel does not know these blocks, as a clause."""
    config, layer, cache = stack.config, stack.period[0], caches[0]
    if len(stack.period) > 1:
        return "blocks differ from each other"
    others = {
        "they have experts": layer.experts,
        f"norm_position is {config.norm_position}": config.norm_position != "pre",
        "a block has no norm before its attention": not layer.attention_norm,
        f"activation is {config.activation}": config.activation not in ACTIVATIONS,
        "the residual stream is mixed with the embedding": config.embedding_skip,
        "layers have value embeddings": config.value_embeddings,
        "attention stays within documents": config.mask_documents,
        "there are virtual tokens": bool(context.shared),
        "there is dropout": context.rng is not None,
        "keys and values are in codes": isinstance(cache, CodedPages),
        "a window has a cache of its own": cache.pages(1) is None,
        "it is not computed in float32": stack.compute_dtype != "float32" or cache.keys.dtype != jnp.float32,
        "matrices are not held for the kernel": not _are_held(blocks),
    }
    return next((reason for reason, holds in others.items() if holds), None)


def _are_held(blocks: PyTree) -> bool:
    return "mlp" in blocks and all(isinstance(own["kernel"], Streamed) for own in _matrices(blocks))


def _matrices(blocks: PyTree) -> list[PyTree]:
    attention, mlp = blocks["attention"], blocks["mlp"]
    return [attention["qkv"], attention["out"], mlp["up"], mlp["down"]]


def _layers(blocks: PyTree) -> Layers:
    def norm(name: str) -> tuple[Array | None, Array | None]:
        own = blocks.get(name, {})
        return own.get("weight"), own.get("bias")

    def matrix(own: PyTree) -> Matrix:
        held: Streamed = own["kernel"]
        if isinstance(held.kept, Quantised):
            return Matrix(held.kept.q, held.kept.scale, held.kept.zero, own.get("bias"), held.rounds)
        return Matrix(held.kept, bias=own.get("bias"))

    heads: Any = [blocks["attention"].get(name, {}).get("weight") for name in ("query_norm", "key_norm")]
    return Layers(
        *map(matrix, _matrices(blocks)),
        attention_norm=norm("attention_norm"),
        mlp_norm=norm("mlp_norm"),
        head_norms=tuple(heads),
    )


def _rule(stack: Stack) -> Rule:
    config = stack.config
    return Rule(
        heads=stack.sizes.heads,
        activation=config.activation,
        centred=config.norm == "layernorm",
        eps=config.norm_eps,
        normalises_heads=config.qk_norm,
        scale=stack.sizes.attention_scale,
        softcap=config.attention_softcap,
        window=stack.period[0].window,
    )
