"""Norms by XLA, with a backward pass that keeps the input and two numbers a row."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cramjax.kernels.norm.rule import Rule


class _Residuals(NamedTuple):
    x: Float[Array, "*batch embed"]
    mean: Float[Array, "*batch 1"] | None
    scale: Float[Array, "*batch 1"]
    weight: Float[Array, " embed"] | None
    bias: Float[Array, " embed"] | None


def normalise_beside(
    rule: Rule,
    x: Float[Array, "*batch embed"],
    weight: Float[Array, " embed"] | None,
    bias: Float[Array, " embed"] | None,
) -> tuple[Float[Array, "*batch embed"], Float[Array, "*batch embed"]]:
    """`x`, and `x` normalised, whose gradients XLA adds."""
    y: Array = _normalise(rule.centred, rule.eps, x, weight, bias)
    return x, y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalise(centred: bool, eps: float, x: Array, weight: Array | None, bias: Array | None) -> Array:
    return _forward(centred, eps, x, weight, bias)[0]


def _forward(centred: bool, eps: float, x: Array, weight: Array | None, bias: Array | None) -> tuple[Array, _Residuals]:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True) if centred else None
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(_centred(wide, mean)), axis=-1, keepdims=True) + eps)
    y = _centred(wide, mean) * scale
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.astype(x.dtype), _Residuals(x, mean, scale, weight, bias)


def _backward(centred: bool, eps: float, residuals: _Residuals, g: Array) -> tuple[Array, Array | None, Array | None]:
    # Without the barrier XLA would find the forward pass's float32 values here, and keep them instead.
    x, mean, scale = jax.lax.optimization_barrier((residuals.x, residuals.mean, residuals.scale))
    weight, bias = residuals.weight, residuals.bias
    y, g, rows = _centred(x.astype(jnp.float32), mean) * scale, g.astype(jnp.float32), tuple(range(g.ndim - 1))
    by_weight = None if weight is None else jnp.sum(g * y, axis=rows).astype(weight.dtype)
    by_bias = None if bias is None else jnp.sum(g, axis=rows).astype(bias.dtype)
    g = g if weight is None else g * weight
    by_x = g - y * jnp.mean(g * y, axis=-1, keepdims=True)
    if centred:
        by_x = by_x - jnp.mean(g, axis=-1, keepdims=True)
    return (scale * by_x).astype(x.dtype), by_weight, by_bias


_normalise.defvjp(_forward, _backward)


def _centred(x: Array, mean: Array | None) -> Array:
    return x if mean is None else x - mean
