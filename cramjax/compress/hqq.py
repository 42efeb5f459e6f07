"""Half-quadratic quantisation: the zeros of asymmetric groups are refined where the error of their weights is sparse.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs) and its code: no
data, and zeros that are no codes, but floats.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cramjax.compress.grid import GroupGrid, nearest

_ITERATIONS, _POWER, _BETA, _GROWTH = 20, 0.7, 10.0, 1.01
"""As in their code: of ‖error‖ₚ, p, and the weight of the quadratic term, which grows."""


@functools.partial(jax.jit, static_argnames=("bits", "group", "scale_dtype"))
def find_refined_grid(w: Float[Array, "inner outer"], *, bits: int, group: int, scale_dtype: str) -> GroupGrid:
    """The grid of a matrix, with the best zeros that were found.

    Steps reach from the smallest weight of a group to the largest, which need not have 0 between them. With W_r what
    the codes stand for, errors E = shrink(W - W_r, β), and the zero becomes the mean of codes - (W - E) / scale, in
    turn. Each group keeps the zero with which its mean absolute error was least; their code ends all groups' search
    when the mean of all does not fall.

    Args:
        w: float32.
        bits: of a code: 8, 4, 3 or 2.
        group: weights of a column that share a scale; it divides `inner`.
        scale_dtype: precision of scales and zeros. Codes are for the rounded ones.
    """
    groups = w.reshape(-1, group, w.shape[-1])
    low, high = groups.min(1), groups.max(1)
    scale = jnp.where(high > low, (high - low) / (2**bits - 1), jnp.maximum(jnp.abs(low), 1e-4))
    scale = scale.astype(scale_dtype).astype(jnp.float32)

    def stored(zero: Array) -> Array:
        return zero.astype(scale_dtype).astype(jnp.float32)

    def refined(number: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        zero, best, least = carry
        codes = nearest(groups, scale[:, None], zero[:, None], bits)
        errors = groups - (codes - zero[:, None]) * scale[:, None]
        error = jnp.mean(jnp.abs(errors), axis=1)
        best, least = jnp.where(error < least, zero, best), jnp.minimum(error, least)
        sparse = shrink(errors, _BETA * _GROWTH ** jnp.asarray(number, jnp.float32))
        return stored(jnp.mean(codes - (groups - sparse) / scale[:, None], axis=1)), best, least

    first = stored(-(2 ** (bits - 1)) - low / scale)
    start = (first, first, jnp.full(first.shape, jnp.inf))
    _, zero, _ = jax.lax.fori_loop(0, _ITERATIONS + 1, refined, start)
    return GroupGrid(scale.astype(scale_dtype), zero.astype(scale_dtype), bits)


def shrink(x: Float[Array, "*shape"], beta: Any) -> Float[Array, "*shape"]:
    """What is least of |e|ᵖ + β/2 (x - e)², about (generalised soft-thresholding): sign(x) · max(0, |x| - |x|ᵖ⁻¹/β)."""
    size = jnp.abs(x)
    return jnp.sign(x) * jnp.maximum(size - jnp.where(size > 0, size, 1.0) ** (_POWER - 1) / beta, 0.0)
