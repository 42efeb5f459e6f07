"""The walk over one packed buffer: every product over real tokens only (ByteTransformer; Zhai et al. 2022).

Buffers come in many shapes, each with a program of its own, so layers are scanned: of MiniLM's six, unrolled, a program
took five times as long to compile, and was no faster.
"""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cramjax.model import walk
from cramjax.model.ragged import Ragged
from cramjax.model.stack import Stack, virtual_tokens


def stream(stack: Stack, params: PyTree, texts: Ragged) -> Float[Array, "places embed"]:
    """The residual stream after the last block, of each token as if its text stood alone.

    Virtual tokens stand before every text, and so have no place in a buffer: with them, the texts are walked as rows.

    Args:
        stack: the model.
        params: all parameters.
        texts: from `cramjax.model.ragged.ragged`; of no text longer than the model's context.

    Returns:
        (places, embed); where no text is, it means nothing.
    """
    stack = replace(stack, unroll=False)
    if virtual_tokens(params):
        types = None if texts.types is None else texts.apart(jnp.asarray(texts.types))
        mask = None if stack.causal else texts.real
        rows = walk.stream(stack, params, texts.apart(jnp.asarray(texts.tokens)), kv_mask=mask, token_types=types)
        return texts.joined(rows)
    types = None if texts.types is None else texts.types[None]
    positions = texts.positions[None]
    return walk.stream(stack, params, texts.tokens[None], positions=positions, token_types=types, texts=texts)[0]
