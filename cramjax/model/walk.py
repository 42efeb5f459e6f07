"""The walk forward over a stack, with `scan` or unrolled."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from cramjax.kernels.packed import prompt_of
from cramjax.model.ragged import Ragged
from cramjax.model.remat import remat_block
from cramjax.model.stack import Stack, unstack


def stream(
    stack: Stack,
    params: PyTree,
    tokens: Int[Array, "batch seq"],
    *,
    positions: Int[Array, "batch seq"] | None = None,
    rng: Array | None = None,
    kv_mask: Bool[Array, "batch seq"] | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    token_types: Int[Array, "batch seq"] | None = None,
    texts: Ragged | None = None,
) -> Float[Array, "batch seq embed"]:
    """The residual stream after the last block, of the tokens alone; arguments as of `Stack.embed`."""
    prompt = prompt_of(params["embed"]["token"]["table"])
    virtual = 0 if prompt is None else len(prompt)
    with jax.named_scope("embed"):
        x, context = stack.embed(
            params,
            tokens,
            positions=positions,
            rng=rng,
            kv_mask=kv_mask,
            segment_ids=segment_ids,
            token_types=token_types,
            texts=texts,
        )
    block = remat_block(stack.block, stack.remat, scanned=not stack.unroll)
    if stack.unroll:
        for layer, block_params in enumerate(unstack(params["blocks"], stack.repeats)):
            with jax.named_scope(f"layer_{layer}"):
                x = block(block_params, x, context, layer)
        return x[:, virtual:]

    def step(x: Array, item: tuple[PyTree, Array]) -> tuple[Array, None]:
        with jax.named_scope("layer"):
            return block(item[0], x, context, item[1]), None

    return jax.lax.scan(step, x, (params["blocks"], jnp.arange(stack.repeats)))[0][:, virtual:]


def hidden(
    stack: Stack,
    params: PyTree,
    tokens: Int[Array, "batch seq"],
    *,
    positions: Int[Array, "batch seq"] | None = None,
    rng: Array | None = None,
    kv_mask: Bool[Array, "batch seq"] | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    token_types: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq embed"]:
    """The whole walk up to what the decoder reads; arguments as of `Stack.embed`."""
    seen: dict[str, Any] = {"positions": positions, "kv_mask": kv_mask, "segment_ids": segment_ids}
    seen |= {"token_types": token_types}
    x = stream(stack, params, tokens, rng=rng, **seen)
    with jax.named_scope("head"):
        return stack.head(params, x)
