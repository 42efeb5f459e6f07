"""Matrices of small floating point numbers: FP8 (e4m3) with a scale for each group of a column's weights, and MXFP4.

Micikevicius et al. 2022 (arXiv:2209.05433), section 3, and the Open Compute Project's Microscaling Formats (MX)
Specification 1.0 (2023; Rouhani et al. 2023, arXiv:2310.10537). Codes are the formats' own bits.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from cramjax.errors import ConfigError
from cramjax.kernels.packed.tiled import Tiled, paired, unpaired

E4M3_MAX = 448.0
E2M1 = np.asarray([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
"""What the codes 0 to 7 of e2m1 stand for; those of 8 to 15 are negative."""
MX_BLOCK = 32
"""Weights of a column that share an exponent in MXFP4."""
_E2M1_EXPONENT = 2
"""Of the largest number of e2m1."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Float8(Tiled):
    """A matrix of numbers of 8 bits (e4m3), each times the scale of its group, or such matrices stacked."""

    fp8: Any
    """Bits of e4m3 numbers, uint8 (..., inner, outer)."""
    scale: Any
    """(..., groups, outer), float32 or bfloat16."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: (..., inner, outer)."""
        return tuple(self.fp8.shape)

    @property
    def dtype(self) -> Any:
        """Of what `unpacked` gives: float32."""
        return jnp.dtype(jnp.float32)

    @property
    def pieces(self) -> int:
        """Groups of a column."""
        return self.scale.shape[-2]

    def repacked(self, w: Float[Array, "*stack inner outer"]) -> "Float8":
        """Another matrix of this shape, in groups of the same length."""
        return float8(w, self.shape[-2] // self.pieces, scale_dtype=self.scale.dtype)

    def unpacked(self) -> Float32[Array, "*stack inner outer"]:
        """The matrix, float32."""
        numbers = jax.lax.bitcast_convert_type(self.fp8, jnp.float8_e4m3fn).astype(jnp.float32)
        return _scaled(numbers, self.scale.astype(jnp.float32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Microscaled(Tiled):
    """A matrix of numbers of 4 bits (e2m1), of which 32 of a column share a power of two, or such matrices stacked."""

    mxfp4: Any
    """Bits of e2m1 numbers, uint8 (..., inner / 2, outer): that of an even row in the low bits of a byte, and that of
    the row after it in the high ones."""
    exponent: Any
    """Powers of two (e8m0, 127 is 2⁰), uint8 (..., inner / 32, outer)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: (..., inner, outer)."""
        *lead, half, outer = self.mxfp4.shape
        return (*lead, 2 * half, outer)

    @property
    def dtype(self) -> Any:
        """Of what `unpacked` gives: float32."""
        return jnp.dtype(jnp.float32)

    @property
    def pieces(self) -> int:
        """Blocks of a column."""
        return self.exponent.shape[-2]

    def repacked(self, w: Float[Array, "*stack inner outer"]) -> "Microscaled":
        """Another matrix of this shape."""
        return microscaled(w)

    def unpacked(self) -> Float32[Array, "*stack inner outer"]:
        """The matrix, float32."""
        values = np.concatenate([E2M1, -E2M1])
        numbers = jnp.take(values, unpaired(self.mxfp4), axis=0, mode="clip")
        return _scaled(numbers, power_of_two(self.exponent))


def float8(
    w: Float[Array, "*stack inner outer"], group: int | None = 64, *, scale_dtype: DTypeLike = jnp.float32
) -> Float8:
    """Round a matrix to the nearest e4m3 numbers; stacked matrices one after the other.

    Args:
        w: the matrix (inner, outer), or matrices stacked on leading axes.
        group: weights of a column that share a scale, with which the largest is 448; null: all. It divides `inner`.
        scale_dtype: precision of scales, float32 or bfloat16. Numbers are found for the rounded scale.

    Raises:
        ConfigError: groups that do not divide the columns.
    """
    group = w.shape[-2] if group is None else group
    if why := float_refusal(w.shape, "fp8", group):
        raise ConfigError(why)
    return _float8(w, group, jnp.dtype(scale_dtype))


def microscaled(w: Float[Array, "*stack inner outer"], group: int | None = MX_BLOCK) -> Microscaled:
    """Round a matrix to MXFP4 as its specification has it (section 6.3); stacked matrices one after the other.

    The largest weight of a block has the exponent of 4 and 6; beyond 6 it becomes 6.

    Args:
        w: the matrix (inner, outer), or matrices stacked on leading axes.
        group: weights of a column that share an exponent: 32.

    Raises:
        ConfigError: columns that are no multiple of 32, or other groups.
    """
    if why := float_refusal(w.shape, "mxfp4", MX_BLOCK if group is None else group):
        raise ConfigError(why)
    return _microscaled(w)


def float_refusal(shape: tuple[int, ...], kind: str, group: int) -> str | None:
    """Why a matrix cannot be kept in such numbers and groups; None: it can.

    Args:
        shape: of the matrix: (..., inner, outer).
        kind: nf4, fp8 or mxfp4.
        group: weights of a column that share a scale.
    """
    inner = shape[-2]
    if kind == "mxfp4" and (group != MX_BLOCK or inner % MX_BLOCK):
        return (
            f"Of MXFP4, {MX_BLOCK} weights share an exponent, and this matrix of shape {shape} has {inner} inputs in "
            f"groups of {group}: use nf4, fp8 or integers."
        )
    if group < 1 or inner % group:
        near = max(n for n in range(1, max(1, min(group, inner)) + 1) if inner % n == 0)
        return f"A group must divide the {inner} inputs of the matrix of shape {shape}, got {group}: {near} would do."
    if kind == "nf4" and inner % 2:
        return f"Weights of 4 bits are kept in pairs of inputs, and this matrix has {inner}: use fp8 or 8 bits."
    return None


def nearest_e4m3(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The nearest numbers of e4m3, in float32; beyond 448 they are 448. Of two as near, the one that ends with 0."""
    return _nearest(x, mantissa=3, least=-6, most=8, largest=E4M3_MAX)


def nearest_e2m1(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The nearest numbers of e2m1, in float32; beyond 6 they are 6. Of two as near, the one that ends with 0."""
    return _nearest(x, mantissa=1, least=0, most=_E2M1_EXPONENT, largest=float(E2M1[-1]))


def e4m3_bits(numbers: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """The bits of numbers of e4m3."""
    return jax.lax.bitcast_convert_type(numbers.astype(jnp.float8_e4m3fn), jnp.uint8)


def e2m1_pairs(numbers: Float32[Array, "inner outer"]) -> UInt8[Array, "half outer"]:
    """The bits of numbers of e2m1, two rows in a byte."""
    size = jnp.searchsorted(E2M1, jnp.abs(numbers), method="scan_unrolled").astype(jnp.uint8)
    return paired(size | jnp.where(numbers < 0, jnp.uint8(8), jnp.uint8(0)))


def float8_scale(largest: Float32[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """Scales of groups by their largest absolute weights; 1 where all of them are 0, or so near that their scale is."""
    scale = (largest / E4M3_MAX).astype(dtype)
    return jnp.where(scale == 0, jnp.ones((), dtype), scale)


def shared_exponent(largest: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Exponents of blocks by their largest absolute weights: ⌊log₂⌋ less that of e2m1's largest number; from 2⁻¹²⁶."""
    biased = jax.lax.bitcast_convert_type(largest, jnp.uint32) >> 23
    exponent = jnp.maximum(biased, _E2M1_EXPONENT + 1) - _E2M1_EXPONENT
    return jnp.where(jnp.isfinite(largest), exponent, 255).astype(jnp.uint8)  # 255 is no number


def power_of_two(exponent: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """What shared exponents stand for; of 255, infinity."""
    return jax.lax.bitcast_convert_type(exponent.astype(jnp.uint32) << 23, jnp.float32)


def _nearest(x: Array, *, mantissa: int, least: int, most: int, largest: float) -> Array:
    """By arithmetic, as conversions of some compilers round twice."""
    exponent = (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23 & 255) - 127
    step = jnp.clip(exponent, least, most) - mantissa + 127
    step = jax.lax.bitcast_convert_type(step << 23, jnp.float32)
    return jnp.clip(jnp.round(x / step) * step, -largest, largest)


def _scaled(numbers: Float32[Array, "*stack inner outer"], scale: Float32[Array, "*stack groups outer"]) -> Array:
    *lead, inner, outer = numbers.shape
    groups = numbers.reshape(*lead, scale.shape[-2], -1, outer)
    return (groups * scale[..., None, :]).reshape(*lead, inner, outer)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _float8(w: Array, group: int, scale_dtype: Any) -> Float8:
    if w.ndim > 2:  # what is in between exists for one matrix at a time
        return jax.lax.map(lambda one: _float8(one, group, scale_dtype), w)
    groups = w.astype(jnp.float32).reshape(-1, group, w.shape[-1])
    scale = float8_scale(jnp.max(jnp.abs(groups), axis=1), scale_dtype)
    numbers = nearest_e4m3(groups / scale.astype(jnp.float32)[:, None])
    return Float8(e4m3_bits(numbers.reshape(w.shape)), scale)


@jax.jit
def _microscaled(w: Array) -> Microscaled:
    if w.ndim > 2:
        return jax.lax.map(_microscaled, w)
    blocks = w.astype(jnp.float32).reshape(-1, MX_BLOCK, w.shape[-1])
    exponent = shared_exponent(jnp.max(jnp.abs(blocks), axis=1))
    numbers = nearest_e2m1(blocks / power_of_two(exponent)[:, None])
    return Microscaled(e2m1_pairs(numbers.reshape(w.shape)), exponent)
