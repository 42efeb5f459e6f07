"""Gated non-linearities for NVIDIA GPUs: both halves of a row are read where they lie, and both gradients written so.

XLA computes the error function of the backward pass for its two readers once, in float32, in memory.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from cramjax.config import Activation
from cramjax.kernels import rows
from cramjax.kernels.mesh import by_token

_COLUMNS = 512
"""Columns of each half that a program holds at once, if there are so many."""


def activate(
    activation: Activation, h: Float[Array, "*batch up"], *, interpret: bool = False
) -> Float[Array, "*batch mlp"]:
    """Apply a gated non-linearity.

    Args:
        activation: one of `GATED`.
        h: gates, then what they let through.
        interpret: run the kernels as plain operations, on any device.
    """
    y: Any = _activate((activation, interpret), h)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activate(static: tuple[Activation, bool], h: Array) -> Array:
    return by_token(lambda _, h: ((), _call(static, h, None)), (), h)[1]


def _forward(static: tuple[Activation, bool], h: Array) -> tuple[Array, Array]:
    return _activate(static, h), h


def _backward(static: tuple[Activation, bool], h: Array, g: Array) -> tuple[Array]:
    return (by_token(lambda _, own: ((), _call(static, *own)), (), (h, g))[1],)


_activate.defvjp(_forward, _backward)


def _call(static: tuple[Activation, bool], h: Array, g: Array | None) -> Array:
    """The result; with its gradient, the gradient of what was read."""
    activation, interpret = static
    up, width = h.shape[-1], h.shape[-1] // 2
    count = h.size // up
    columns = min(_COLUMNS, rows.power_of_two(width))
    at_once = rows.rows_at_once(columns)
    wide = pl.BlockSpec((at_once, up), lambda i, j: (i, 0))
    narrow = pl.BlockSpec((at_once, width), lambda i, j: (i, 0))

    def kernel(h_ref: Any, g_ref: Any, out_ref: Any) -> None:
        start = pl.program_id(1) * columns
        row = pl.program_id(0) * at_once + jnp.arange(at_once)
        mask = (row < count)[:, None] & (start + jnp.arange(columns) < width)[None]
        first, second = (slice(None), pl.ds(start, columns)), (slice(None), pl.ds(width + start, columns))
        gate, x = rows.load(h_ref, mask, *first), rows.load(h_ref, mask, *second)
        y, slope = _value_and_slope(activation, gate)
        if g_ref is None:
            rows.store(out_ref, y * x, mask, *first)
        else:
            g = rows.load(g_ref, mask, *first)
            rows.store(out_ref, g * x * slope, mask, *first)
            rows.store(out_ref, g * y, mask, *second)

    result = width if g is None else up
    out = rows.call(
        kernel,
        name=f"{activation}_{'forward' if g is None else 'backward'}",
        interpret=interpret,
        grid=(pl.cdiv(count, at_once), pl.cdiv(width, columns)),
        in_specs=[wide, None if g is None else narrow],
        out_specs=narrow if g is None else wide,
        out_shape=jax.ShapeDtypeStruct((count, result), h.dtype),
    )(h.reshape(-1, up), None if g is None else g.reshape(-1, width))
    return out.reshape(*h.shape[:-1], result)


def _value_and_slope(activation: Activation, gate: Array) -> tuple[Array, Array]:
    """The non-linearity of a gate, and its derivative."""
    if activation == "swiglu":
        share = 1 / (1 + jnp.exp(-gate))
        return gate * share, share * (1 + gate * (1 - share))
    if activation == "geglu_tanh":
        square = gate * gate
        share = 1 / (1 + jnp.exp(-_TANH * gate * (1 + 0.044715 * square)))
        return gate * share, share * (1 + (1 - share) * _TANH * gate * (1 + 3 * 0.044715 * square))
    share = _normal_cdf(gate)
    return gate * share, share + gate * jnp.exp(-gate * gate / 2) * (1 / math.sqrt(2 * math.pi))


# (1 + tanh(u)) / 2 is the logistic function of 2u.
_TANH = 2 * math.sqrt(2 / math.pi)
# erfc(z) = t exp(P(t) - z²) with t = 1 / (1 + z / 2) for z ≥ 0, to 1.2e-7 of it (Press et al., Numerical Recipes,
# section 6.2). Triton's lowering has no error function.
_ERFC = (
    -1.26551223,
    1.00002368,
    0.37409196,
    0.09678418,
    -0.18628806,
    0.27886807,
    -1.13520398,
    1.48851587,
    -0.82215223,
    0.17087277,
)


def _normal_cdf(x: Array) -> Array:
    """The standard normal's distribution function."""
    t = 1 / (1 + jnp.abs(x) * (math.sqrt(0.5) / 2))
    exponent = jnp.full_like(t, _ERFC[-1])
    for coefficient in reversed(_ERFC[:-1]):
        exponent = coefficient + t * exponent
    tail = t * jnp.exp(exponent - x * x / 2) / 2
    return jnp.where(x < 0, tail, 1 - tail)
