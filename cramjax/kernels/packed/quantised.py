"""Matrices of 8, 4, 3 or 2 bits per weight: integers, and a scale for each group of a column's weights.

A group is a stretch of the input axis.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from cramjax.errors import ConfigError
from cramjax.kernels.dense.packed import Packed
from cramjax.kernels.packed.tiled import Tiled, paired, unpaired

BITS = (8, 4, 3, 2)
WORDS = {8: jnp.int8, 4: jnp.uint8, 3: jnp.uint16, 2: jnp.uint32}
"""What codes of so many bits are kept in; it tells how many they are."""
_ROWS = {8: (1, 1), 4: (2, 1), 3: (16, 3), 2: (16, 1)}
"""Rows of the matrix that so many rows of words hold."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Quantised(Tiled):
    """A matrix w = (codes - zero) · scale, or such matrices stacked on leading axes.

    Parts may be arrays, or stand for some: shapes, shardings.
    """

    q: Any
    """Codes c from -2^(bits - 1) to 2^(bits - 1) - 1. 8 bits: int8 (..., inner, outer). 4 bits: uint8
    (..., inner / 2, outer), each of two c + 8: that of an even row in the low bits, and that of the row after it in the
    high ones. 2 bits: uint32 (..., inner / 16, outer), each of 16 rows' c + 2, from the lowest bits up. 3 bits: uint16
    (..., 3 · inner / 16, outer), for 16 rows one of the lowest bits of their c + 4, one of the middle ones and one of
    the highest, each from the lowest bit up."""
    scale: Any
    """(..., groups, outer), float32 or bfloat16."""
    zero: Any = None
    """The code of 0, like `scale` in shape and type, which need be no integer; None: 0."""
    bits: int = field(default=8, metadata={"static": True})
    """Of a code: 8, 4, 3 or 2."""
    rounds: bool = field(default=False, metadata={"static": True})
    """Whether the rows that it is multiplied with are rounded too, to 8 bits."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: (..., inner, outer)."""
        *lead, rows, outer = self.q.shape
        held, words = _ROWS[self.bits]
        return (*lead, rows // words * held, outer)

    @property
    def dtype(self) -> Any:
        """Of what `unpacked` gives: float32."""
        return jnp.dtype(jnp.float32)

    @property
    def group(self) -> int:
        """Weights of a column that share a scale."""
        return self.shape[-2] // self.scale.shape[-2]

    @property
    def pieces(self) -> int:
        """Groups of a column."""
        return self.scale.shape[-2]

    def repacked(self, w: Float[Array, "*stack inner outer"]) -> "Quantised":
        """Another matrix of this shape, with as many bits, and groups and zeros of the same kind."""
        made = quantise(w, self.bits, self.group, symmetric=self.zero is None, scale_dtype=self.scale.dtype)
        return replace(made, rounds=self.rounds)

    def read(self, x: Float[Array, "rows inner"]) -> Float[Array, "rows inner"]:
        """Rows as it multiplies them: with `rounds`, each in steps of its own in each group of inputs, the largest of
        which is 127 of them. Their gradient is that of rows as they are.
        """
        if not self.rounds:
            return x
        groups = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, self.group)
        step = jnp.max(jnp.abs(groups), axis=-1, keepdims=True) / 127
        near = jnp.round(groups / jnp.where(step == 0, 1, step)) * step
        return jax.lax.stop_gradient(near.reshape(x.shape).astype(x.dtype)) + (x - jax.lax.stop_gradient(x))

    def multiply(self, x: Float[Array, "rows inner"], dtype: DTypeLike) -> Float[Array, "rows outer"]:
        """The product of rows with the matrix; see `Packed.multiply`."""
        return super().multiply(self.read(x), dtype)

    def unpacked(self) -> Float[Array, "*stack inner outer"]:
        """The matrix, float32."""
        codes = self.codes().astype(jnp.float32)
        *lead, inner, outer = codes.shape
        groups = codes.reshape(*lead, -1, self.group, outer)
        if self.zero is not None:
            groups = groups - self.zero.astype(jnp.float32)[..., None, :]
        return (groups * self.scale.astype(jnp.float32)[..., None, :]).reshape(*lead, inner, outer)

    def codes(self) -> Int[Array, "*stack inner outer"]:
        """The integers, one each, int8."""
        if self.bits == 8:
            return self.q
        if self.bits == 4:
            return unpaired(self.q).astype(jnp.int8) - jnp.int8(8)
        *lead, rows, outer = self.q.shape
        row = jnp.arange(16, dtype=self.q.dtype)[:, None]
        if self.bits == 2:
            codes = (self.q[..., None, :] >> (2 * row)) & 3
        else:
            planes = self.q.reshape(*lead, rows // 3, 3, 1, outer) >> row & 1
            codes = planes[..., 0, :, :] | planes[..., 1, :, :] << 1 | planes[..., 2, :, :] << 2
        return codes.reshape(self.shape).astype(jnp.int8) - jnp.int8(2 ** (self.bits - 1))


def rounding_rows(params: PyTree) -> PyTree:
    """Parameters whose matrices of codes round what they are multiplied with to 8 bits.

    Args:
        params: nested dicts of arrays and packed leaves.
    """

    def rounding(leaf: Any) -> Any:
        return replace(leaf, rounds=True) if isinstance(leaf, Quantised) else leaf

    return jax.tree.map(rounding, params, is_leaf=lambda leaf: isinstance(leaf, Packed))


def without_rounding(leaf: Any) -> Any:
    """A leaf of the parameters that multiplies rows as they are."""
    return replace(leaf, rounds=False) if isinstance(leaf, Quantised) else leaf


def quantisation_refusal(shape: tuple[int, ...], bits: int, group: int) -> str | None:
    """Why a matrix cannot be kept in so many bits and such groups; None: it can.

    Args:
        shape: of the matrix: (..., inner, outer).
        bits: of a code.
        group: weights of a column that share a scale.
    """
    inner = shape[-2]
    if bits not in BITS:
        return f"A weight is quantised to 8, 4, 3 or 2 bits, got {bits}."
    if group < 1 or inner % group:
        near = max(n for n in range(1, max(1, min(group, inner)) + 1) if inner % n == 0)
        return f"A group must divide the {inner} inputs of the matrix of shape {shape}, got {group}: {near} would do."
    if bits == 4 and inner % 2:
        return f"Weights of 4 bits are kept in pairs of inputs, and this matrix has {inner}: use 8 bits."
    if bits < 4 and (inner % 16 or group % 16):
        return (
            f"Weights of {bits} bits are kept for 16 inputs together, and this matrix has {inner} in groups of "
            f"{group}: use 4 or 8 bits, or groups of a multiple of 16."
        )
    return None


def coded(codes: Int[Array, "inner outer"], scale: Array, zero: Array | None, bits: int) -> Quantised:
    """A matrix from its codes, one each, int8; scale and zero are as of `Quantised`."""
    if bits == 8:
        return Quantised(codes, scale, zero, bits)
    own = (codes + jnp.int8(2 ** (bits - 1))).astype(WORDS[bits])
    if bits == 4:
        return Quantised(paired(own), scale, zero, bits)
    groups = own.reshape(-1, 16, own.shape[-1])
    row = jnp.arange(16, dtype=own.dtype)[:, None]
    if bits == 2:
        return Quantised(jnp.sum(groups << (2 * row), axis=1, dtype=own.dtype), scale, zero, bits)
    planes = jnp.stack([jnp.sum((groups >> bit & 1) << row, axis=1, dtype=own.dtype) for bit in range(3)], axis=1)
    return Quantised(planes.reshape(-1, own.shape[-1]), scale, zero, bits)


def quantise(
    w: Float[Array, "*stack inner outer"],
    bits: int = 8,
    group: int | None = 64,
    *,
    symmetric: bool = True,
    scale_dtype: DTypeLike = jnp.float32,
) -> Quantised:
    """Round a matrix to the nearest codes; stacked matrices one after the other.

    Args:
        w: the matrix (inner, outer), or matrices stacked on leading axes.
        bits: of a code: 8, 4, 3 or 2.
        group: weights of a column that share a scale; null: all of it. It divides `inner`.
        symmetric: steps reach from minus to plus the largest weight of a group, and 0 is code 0. Otherwise they reach
            from the smallest to the largest weight, or to 0, which has a code of its own in each group.
        scale_dtype: precision of scales and of zeros, float32 or bfloat16. Codes are found for the rounded scale.

    Raises:
        ConfigError: other bits, or groups that do not divide the columns or cannot be kept so.
    """
    inner = w.shape[-2]
    group = inner if group is None else group
    if why := quantisation_refusal(w.shape, bits, group):
        raise ConfigError(why)
    return _quantise(w, bits, group, symmetric, jnp.dtype(scale_dtype))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantise(w: Array, bits: int, group: int, symmetric: bool, scale_dtype: Any) -> Quantised:
    if w.ndim > 2:  # what is in between exists for one matrix at a time
        return jax.lax.map(lambda one: _quantise(one, bits, group, symmetric, scale_dtype), w)
    inner, outer = w.shape
    groups = w.astype(jnp.float32).reshape(-1, group, outer)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        low, step = None, jnp.max(jnp.abs(groups), axis=1) / most
    else:
        low = jnp.minimum(jnp.min(groups, axis=1), 0.0)
        step = (jnp.maximum(jnp.max(groups, axis=1), 0.0) - low) / (most - least)
    scale = step.astype(scale_dtype)
    # Rounded up, so that the codes reach the largest weight.
    scale = jnp.where(scale < step, jnp.nextafter(scale, jnp.asarray(jnp.inf, scale_dtype)), scale)
    scale = jnp.where(scale == 0, 1, scale)  # of zeros alone
    exact = scale.astype(jnp.float32)
    zero = None if low is None else jnp.clip(jnp.round(-low / exact) + least, least, most).astype(scale_dtype)
    centre = 0.0 if zero is None else zero.astype(jnp.float32)[:, None]
    codes = jnp.round(groups / exact[:, None]) + centre
    codes = jnp.clip(codes, -most if symmetric else least, most).reshape(inner, outer).astype(jnp.int8)
    return coded(codes, scale, zero, bits)
