"""All blocks of a stack for a few new tokens, by a kernel in C++ for CPUs: a token's step, in one call.

Between the products of one token XLA spends more time than on them; the kernel's threads stay together until the last
layer is done. What it computes is `cramjax.model.block`, for the blocks that `cramjax.model.in_one_call` says.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cramjax.config import GATED, Activation
from cramjax.kernels import native
from cramjax.kernels.dense.few_rows import MOST_ROWS

MOST_TOKENS = MOST_ROWS
"""That one call takes."""
ACTIVATIONS: dict[Activation, int] = {
    "gelu": 0,
    "geglu": 0,
    "gelu_tanh": 1,
    "geglu_tanh": 1,
    "swiglu": 2,
    "relu2": 3,
}
"""Those that the kernel knows, by its numbers for what they make of a gate."""
_SOURCE, _NAME = Path(__file__).with_suffix(".cpp"), "cramjax_walk"


@dataclass(frozen=True)
class Matrix:
    """A matrix of each layer, in a form that `few_rows` reads; parts are stacked over the layers."""

    w: Array
    scale: Array | None = None
    zero: Array | None = None
    bias: Array | None = None
    rounds: bool = False
    """Whether the rows that it multiplies are rounded to 8 bits."""


@dataclass(frozen=True)
class Layers:
    """What blocks are made of, stacked over the layers; a norm is its weight and its bias, None where it has none."""

    qkv: Matrix
    out: Matrix
    up: Matrix
    """With a gate: that first, then what it lets through."""
    down: Matrix
    attention_norm: tuple[Array | None, Array | None]
    mlp_norm: tuple[Array | None, Array | None]
    head_norms: tuple[Array | None, Array | None] = (None, None)
    """Weights of queries' and of keys'."""


@dataclass(frozen=True)
class Rule:
    """How blocks compute."""

    heads: int
    activation: Activation
    centred: bool
    """Whether norms take the mean off."""
    eps: float
    normalises_heads: bool
    scale: float
    """Multiplies the scores."""
    softcap: float | None
    window: int | None


def refusal() -> str | None:
    """Why the kernel cannot run on this machine's CPU, as a clause; None where it can. The first call compiles it."""
    return native.register(_SOURCE, _NAME)


def walk(
    x: Float[Array, "tokens embed"],
    layers: Layers,
    rule: Rule,
    rotary: tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]] | None,
    keys: Float[Array, "layers pages places kv_heads head_dim"],
    values: Float[Array, "layers pages places kv_heads head_dim"],
    table: Int[Array, "tokens held"],
    lengths: Int[Array, " tokens"],
    *,
    apart: bool,
) -> tuple[
    Float[Array, "tokens embed"],
    Float[Array, "layers pages places kv_heads head_dim"],
    Float[Array, "layers pages places kv_heads head_dim"],
]:
    """Take at most eight new tokens through all blocks, in float32, and hold their keys and values; without a gradient.

    Args:
        x: the residual stream (tokens, embed).
        layers: the blocks.
        rule: how they compute.
        rotary: cosines and sines of each token's angles; None: heads are not turned.
        keys: pages of float32 keys.
        values: shaped as the keys.
        table: the pages of each token's text, in order.
        lengths: tokens of each text that its token sees, itself included; 0: it is nobody's, and writes nothing.
        apart: whether several tokens are of one text, so that one reads what another writes.

    Returns:
        The stream after the last block; and keys and values with the new ones, in place where nobody else has them.
    """
    none = jnp.zeros(0, jnp.float32)

    def floats(array: Array | None) -> Array:
        return none if array is None else array.astype(jnp.float32)

    matrices = (layers.qkv, layers.out, layers.up, layers.down)
    parts: list[Any] = [floats(part) for norm in (layers.attention_norm, layers.mlp_norm) for part in norm]
    parts += map(floats, layers.head_norms)
    for matrix in matrices:
        parts += [matrix.w, floats(matrix.scale), floats(matrix.zero), floats(matrix.bias)]
    cos, sin = (none, none) if rotary is None else map(floats, rotary)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x.shape, keys.shape, values.shape)]
    call = jax.ffi.ffi_call(_NAME, shapes, input_output_aliases={3: 1, 4: 2})
    made, keys, values = call(
        x.astype(jnp.float32),
        cos,
        sin,
        keys,
        values,
        table.astype(jnp.int32),
        lengths.astype(jnp.int32),
        *parts,
        heads=np.int64(rule.heads),
        activation=np.int64(ACTIVATIONS[rule.activation]),
        gated=rule.activation in GATED,
        centred=rule.centred,
        apart=apart,
        eps=np.float32(rule.eps),
        head_eps=np.float32(rule.eps if rule.normalises_heads else -1.0),
        rounds=np.int64(sum(matrix.rounds << place for place, matrix in enumerate(matrices))),
        scale=np.float32(rule.scale),
        softcap=np.float32(rule.softcap or 0.0),
        window=np.int64(rule.window or 0),
    )
    return made, keys, values
