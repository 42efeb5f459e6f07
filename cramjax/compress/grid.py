"""Grids that weights are rounded to: for each group of a column's weights a scale, and the code that stands for 0.

Codes are integers of `bits` bits from -2^(bits - 1) on, all of which are used (Frantar et al. 2022, arXiv:2210.17323,
code). Ranges contain 0, so that a weight of 0 stays one.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cramjax.kernels.packed import Coded, Packed, Quantised, coded, write_coded

SHRINKS, STEPS, POWER = 80, 100, 2.4
"""Ranges that are tried, their distance as a share of the whole one, and the power of errors."""


class Grid(Protocol):
    """What weights of a matrix are rounded to; a pytree."""

    @property
    def groups(self) -> int:
        """Of a column's weights."""
        ...

    def rounded(self, w: Float[Array, "*rows outer"], group: Any) -> Float[Array, "*rows outer"]:
        """Weights of a group, each on the grid."""
        ...

    def leaf(self, w: Float[Array, "inner outer"]) -> Packed:
        """A matrix rounded to the grid."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class GroupGrid:
    """A weight is near (code - zero) · scale."""

    scale: Any
    """(groups, outer), in the precision that it is stored in."""
    zero: Any
    """Codes of 0, like `scale`; None: 0."""
    bits: int = field(metadata={"static": True})

    def rows(self) -> tuple[Float[Array, "groups outer"], Float[Array, "groups outer"]]:
        """Scales and zeros in float32."""
        scale = self.scale.astype(jnp.float32)
        return scale, jnp.zeros_like(scale) if self.zero is None else self.zero.astype(jnp.float32)

    @property
    def groups(self) -> int:
        """Of a column's weights."""
        return len(self.scale)

    def rounded(self, w: Float[Array, "*rows outer"], group: Any) -> Float[Array, "*rows outer"]:
        """Weights of a group, each on the grid."""
        scale, zero = self.rows()
        return (nearest(w, scale[group], zero[group], self.bits) - zero[group]) * scale[group]

    def leaf(self, w: Float[Array, "inner outer"]) -> Quantised:
        """A matrix rounded to the nearest codes."""
        return _leaf(self, w)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TernaryGrid:
    """A weight is 0 or one of two levels of its column: that which lies on its side, if it is beyond half of what the
    column reached (Frantar and Alistarh 2023, arXiv:2310.16795, section 3.2).
    """

    levels: Any
    """(2, outer), bfloat16: below 0 and above it."""
    reach: Any
    """(2, outer): the smallest and the largest weight, float32."""

    @property
    def groups(self) -> int:
        """Of a column's weights."""
        return 1

    def rounded(self, w: Float[Array, "*rows outer"], group: Any) -> Float[Array, "*rows outer"]:
        """Weights, each on the grid."""
        low, high = self.levels.astype(jnp.float32)
        return jnp.where(w < self.reach[0] / 2, low, jnp.where(w > self.reach[1] / 2, high, 0.0))

    def leaf(self, w: Float[Array, "inner outer"]) -> Coded:
        """A matrix on the grid in words, in host memory."""
        rounded = np.asarray(self.rounded(w, 0))
        return write_coded(((rounded < 0) + 2 * (rounded > 0)).astype(np.uint8), np.asarray(self.levels))


def nearest(w: Array, scale: Array, zero: Array, bits: int) -> Array:
    """The codes nearest to weights, as floats; of two as near, the even one before the zero's integer is added."""
    whole = jnp.round(zero)
    return jnp.clip(jnp.round(w / scale + (zero - whole)) + whole, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@functools.partial(jax.jit, static_argnames=("bits", "group", "symmetric", "mse", "scale_dtype"))
def find_grid(
    w: Float[Array, "inner outer"], *, bits: int, group: int, symmetric: bool, mse: bool, scale_dtype: str
) -> GroupGrid:
    """The grid of a matrix.

    Args:
        w: float32.
        bits: of a code.
        group: weights of a column that share a scale; it divides `inner`.
        symmetric: the range reaches from minus the largest absolute weight to that. Else it reaches from the smallest
            weight to the largest, or to 0.
        mse: shrink ranges to where Σ|error|^2.4 is least.
        scale_dtype: precision of scales and zeros. Codes are for the rounded scale.
    """
    groups = w.reshape(-1, group, w.shape[-1])
    low, high = jnp.minimum(groups.min(1), 0.0), jnp.maximum(groups.max(1), 0.0)
    if symmetric:
        high = jnp.maximum(-low, high)
        low = -high
    empty = low == high
    low, high = jnp.where(empty, -1.0, low), jnp.where(empty, 1.0, high)

    def grid(shrink: Any) -> tuple[Array, Array]:
        scale = ((high - low) * shrink / (2**bits - 1)).astype(scale_dtype).astype(jnp.float32)
        if symmetric:
            return scale, jnp.zeros_like(scale)
        least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        return scale, jnp.clip(jnp.round(-low * shrink / scale) + least, least, most)

    def tried(number: Any, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        scale, zero = grid(1 - number / STEPS)
        rounded = (nearest(groups, scale[:, None], zero[:, None], bits) - zero[:, None]) * scale[:, None]
        error = jnp.sum(jnp.abs(rounded - groups) ** POWER, axis=1)
        better = error < best[0]
        return tuple(jnp.where(better, new, old) for new, old in zip((error, scale, zero), best, strict=True))  # pyright: ignore

    scale, zero = grid(1.0)
    if mse:
        start = (jnp.full(scale.shape, jnp.inf), scale, zero)
        _, scale, zero = jax.lax.fori_loop(0, SHRINKS, tried, start)
    return GroupGrid(scale.astype(scale_dtype), None if symmetric else zero.astype(scale_dtype), bits)


@functools.partial(jax.jit, static_argnames="means")
def find_ternary_grid(w: Float[Array, "inner outer"], *, means: bool) -> TernaryGrid:
    """The ternary grid of a matrix.

    Args:
        w: float32.
        means: levels are the means of the weights beyond half of the smallest and of the largest, whose error is least
            for this share of zeros. Else they are these two themselves.
    """
    reach = jnp.stack([jnp.minimum(w.min(0), 0.0), jnp.maximum(w.max(0), 0.0)])
    if not means:
        return TernaryGrid(reach.astype(jnp.bfloat16), reach)
    beyond = jnp.stack([w < reach[0] / 2, w > reach[1] / 2])
    sums = jnp.sum(jnp.where(beyond, w, 0.0), axis=1)
    return TernaryGrid((sums / jnp.maximum(beyond.sum(axis=1), 1)).astype(jnp.bfloat16), reach)


@jax.jit
def _leaf(grid: GroupGrid, w: Array) -> Quantised:
    scale, zero = grid.rows()
    groups = w.reshape(len(scale), -1, w.shape[-1])
    codes: Int[Array, "inner outer"] = nearest(groups, scale[:, None], zero[:, None], grid.bits).astype(jnp.int8)
    return coded(codes.reshape(w.shape), grid.scale, grid.zero, grid.bits)
