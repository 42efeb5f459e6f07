"""Norms for NVIDIA GPUs: each pass reads a row once, and the backward pass keeps nothing but the input.

The backward kernel adds the gradient that the input has beside the norm. Gradients of weight and bias are summed by
each program over the rows that it visits, then over programs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from cramjax.kernels import rows
from cramjax.kernels.mesh import by_token
from cramjax.kernels.norm.rule import Rule

_PROGRAMS = 1024
"""Most programs that sum gradients of weights: several for each multiprocessor, and few enough to add up."""


def normalise_beside(
    rule: Rule,
    x: Float[Array, "*batch embed"],
    weight: Float[Array, " embed"] | None,
    bias: Float[Array, " embed"] | None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "*batch embed"], Float[Array, "*batch embed"]]:
    """`x`, and `x` normalised.

    Args:
        rule: which norm.
        x: what to normalise.
        weight: multiplies the result.
        bias: added to the result.
        interpret: run the kernels as plain operations, on any device.
    """
    both: Any = _beside(rule, interpret, x, weight, bias)
    return both


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _beside(rule: Rule, interpret: bool, x: Array, weight: Array | None, bias: Array | None) -> tuple[Array, Array]:
    return x, _normalised(rule, interpret, x, weight, bias)


def _forward(
    rule: Rule, interpret: bool, x: Array, weight: Array | None, bias: Array | None
) -> tuple[tuple[Array, Array], tuple[Array, Array | None, Array | None]]:
    return _beside(rule, interpret, x, weight, bias), (x, weight, bias)


def _backward(rule: Rule, interpret: bool, residuals: Any, gs: tuple[Array, Array]) -> tuple[Any, Any, Any]:
    x, weight, bias = residuals
    g_stream, g = gs

    def differentiate(weight: Array | None, tokens: tuple[Array, Array, Array | None]) -> tuple[Any, Array]:
        x, g, g_stream = tokens
        wanted = weight is not None, bias is not None
        by_x, *sums = _call_backward(rule, interpret, wanted, x, g, g_stream, weight)
        return tuple(None if own is None else jnp.sum(own, axis=0) for own in sums), by_x

    (by_weight, by_bias), by_x = by_token(differentiate, weight, (x, g, g_stream if rule.beside else None))
    return (
        by_x,
        None if by_weight is None else by_weight.astype(weight.dtype),
        None if by_bias is None else by_bias.astype(bias.dtype),
    )


_beside.defvjp(_forward, _backward)


def _normalised(rule: Rule, interpret: bool, x: Array, weight: Array | None, bias: Array | None) -> Array:
    def normalise(shared: tuple[Array | None, Array | None], x: Array) -> tuple[tuple[()], Array]:
        return (), _call_forward(rule, interpret, x, *shared)

    return by_token(normalise, (weight, bias), x)[1]


def _call_forward(rule: Rule, interpret: bool, x: Array, weight: Array | None, bias: Array | None) -> Array:
    blocks = _Blocks(x, programs=None)
    y = rows.call(
        functools.partial(_forward_kernel, rule=rule, blocks=blocks),
        name="norm_forward",
        interpret=interpret,
        numbers=blocks.rows_at_once * blocks.padded,
        grid=(blocks.programs,),
        in_specs=[blocks.rows, blocks.columns(weight), blocks.columns(bias)],
        out_specs=blocks.rows,
        out_shape=jax.ShapeDtypeStruct((blocks.count, blocks.width), x.dtype),
    )(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.reshape(x.shape)


def _forward_kernel(x_ref: Any, weight_ref: Any, bias_ref: Any, y_ref: Any, *, rule: Rule, blocks: "_Blocks") -> None:
    def visit(places: Any, mask: Array) -> None:
        y = _scaled(rule, rows.load(x_ref, mask, *places), mask, blocks.width)[0]
        if weight_ref is not None:
            y = y * rows.load(weight_ref, blocks.real)
        if bias_ref is not None:
            y = y + rows.load(bias_ref, blocks.real)
        rows.store(y_ref, y, mask, *places)

    blocks.walk(lambda places, mask, _: visit(places, mask), None)


def _call_backward(
    rule: Rule,
    interpret: bool,
    wanted: tuple[bool, bool],
    x: Array,
    g: Array,
    g_stream: Array | None,
    weight: Array | None,
) -> tuple[Array, Array | None, Array | None]:
    """Gradients by the input, and sums of those by weight and bias for each program where they are wanted."""
    blocks = _Blocks(x, programs=_PROGRAMS if any(wanted) else None)
    sums = [
        (jax.ShapeDtypeStruct((blocks.programs, blocks.width), jnp.float32), blocks.own) if each else (None, None)
        for each in wanted
    ]
    flat = [None if a is None else a.reshape(-1, x.shape[-1]) for a in (x, g, g_stream)]
    by_x, by_weight, by_bias = rows.call(
        functools.partial(_backward_kernel, rule=rule, blocks=blocks),
        name="norm_backward",
        interpret=interpret,
        numbers=blocks.rows_at_once * blocks.padded,
        grid=(blocks.programs,),
        in_specs=[*(None if a is None else blocks.rows for a in flat), blocks.columns(weight)],
        out_specs=[blocks.rows, *(spec for _, spec in sums)],
        out_shape=[jax.ShapeDtypeStruct((blocks.count, blocks.width), x.dtype), *(shape for shape, _ in sums)],
    )(*flat, weight)
    return by_x.reshape(x.shape), by_weight, by_bias


def _backward_kernel(
    x_ref: Any,
    g_ref: Any,
    g_stream_ref: Any,
    weight_ref: Any,
    by_x_ref: Any,
    by_weight_ref: Any,
    by_bias_ref: Any,
    *,
    rule: Rule,
    blocks: "_Blocks",
) -> None:
    def visit(places: Any, mask: Array, sums: tuple[Array | None, Array | None]) -> tuple[Array | None, Array | None]:
        y, scale = _scaled(rule, rows.load(x_ref, mask, *places), mask, blocks.width)
        g = rows.load(g_ref, mask, *places)
        by_weight, by_bias = sums
        by_weight = None if by_weight is None else by_weight + g * y
        by_bias = None if by_bias is None else by_bias + g
        if weight_ref is not None:
            g = g * rows.load(weight_ref, blocks.real)
        by_x = g - y * _mean(g * y, blocks.width)
        if rule.centred:
            by_x = by_x - _mean(g, blocks.width)
        by_x = scale * by_x
        if g_stream_ref is not None:
            by_x = by_x + rows.load(g_stream_ref, mask, *places)
        rows.store(by_x_ref, by_x, mask, *places)
        return by_weight, by_bias

    nothing = jnp.zeros((blocks.rows_at_once, blocks.padded), jnp.float32)
    refs = by_weight_ref, by_bias_ref
    sums = blocks.walk(visit, tuple(None if ref is None else nothing for ref in refs))
    for ref, own in zip(refs, sums, strict=True):
        if ref is not None:
            rows.store(ref, jnp.sum(own, axis=0), blocks.real)


def _scaled(rule: Rule, x: Array, mask: Array, width: int) -> tuple[Array, Array]:
    """Rows with a root mean square of 1, before weight and bias, and what they were multiplied with."""
    if rule.centred:
        x = jnp.where(mask, x - _mean(x, width), 0)
    scale = jax.lax.rsqrt(_mean(jnp.square(x), width) + rule.eps)
    return x * scale, scale


def _mean(x: Array, width: int) -> Array:
    return jnp.sum(x, axis=1, keepdims=True) / width


class _Blocks:
    """How the rows of an array are shared among programs, each of which visits consecutive ones, some at a time."""

    def __init__(self, x: Array, programs: int | None) -> None:
        self.width = x.shape[-1]
        self.count = x.size // self.width
        self.padded = rows.power_of_two(self.width)
        self.rows_at_once = rows.rows_at_once(self.padded)
        visits = pl.cdiv(self.count, self.rows_at_once)
        self.visits = 1 if programs is None else pl.cdiv(visits, programs)
        self.programs = pl.cdiv(visits, self.visits)
        self.rows = pl.BlockSpec((self.visits * self.rows_at_once, self.padded), lambda i: (i, 0))
        self.own = pl.BlockSpec((None, self.padded), lambda i: (i, 0))

    @staticmethod
    def columns(x: Array | None) -> pl.BlockSpec | None:
        """Of a weight or bias, which every program reads."""
        return None if x is None else pl.BlockSpec((rows.power_of_two(len(x)),), lambda _: (0,))

    @property
    def real(self) -> Array:
        """Which columns are no padding."""
        return jnp.arange(self.padded) < self.width

    def walk(self, visit: Any, carry: Any) -> Any:
        """Visit the program's rows, some at a time: `(places in the block, mask, carry) -> carry`."""
        own = pl.program_id(0) * self.visits * self.rows_at_once  # interpreted, a loop does not know its program

        def step(number: Any, carry: Any) -> Any:
            start = number * self.rows_at_once
            mask = ((own + start + jnp.arange(self.rows_at_once)) < self.count)[:, None] & self.real[None]
            return visit((pl.ds(start, self.rows_at_once), slice(None)), mask, carry)

        return step(0, carry) if self.visits == 1 else jax.lax.fori_loop(0, self.visits, step, carry)
