"""Matrices of 4 bits per weight whose codes are quantiles of a normal distribution, as QLoRA's base has them.

Dettmers et al. 2023 (arXiv:2305.14314), section 3: NF4, in blocks with a scale each, and double quantisation of the
scales. Numbers are those of bitsandbytes. There a block is a stretch of the weights of (out, in), one row after the
other; here it is one of a column of inputs, which is the same where blocks divide the inputs, and else refused.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from cramjax.errors import ConfigError
from cramjax.kernels.packed.tiled import Tiled, paired, unpaired

NF4 = np.asarray(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""What the codes 0 to 15 stand for, in units of the block's largest weight (appendix E)."""

SCALES = 256
"""Scales of blocks that share one of the second level."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class NormalFloat(Tiled):
    """A matrix of codes, each times the largest absolute weight of its block, or such matrices stacked on leading axes.

    Parts may be arrays, or stand for some: shapes, shardings.
    """

    nf4: Any
    """Codes, uint8 (..., inner / 2, outer): that of an even row in the low bits of a byte, and that of the row after it
    in the high ones."""
    absmax: Any
    """(..., blocks, outer): scales of blocks, float32; or, doubly quantised, codes of the 8-bit map, uint8."""
    absmax_scale: Any = None
    """(..., 1, n): what codes of `absmax` are multiplied with, float32; one for each 256 of them, counted down one
    column after the other. None: `absmax` is what it is."""
    absmax_mean: Any = None
    """(..., 1, 1): what is added to them then, float32."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: (..., inner, outer)."""
        *lead, half, outer = self.nf4.shape
        return (*lead, 2 * half, outer)

    @property
    def dtype(self) -> Any:
        """Of what `unpacked` gives: float32."""
        return jnp.dtype(jnp.float32)

    @property
    def pieces(self) -> int:
        """Blocks of a column."""
        return self.absmax.shape[-2]

    @property
    def block(self) -> int:
        """Weights of a column that share a scale."""
        return self.shape[-2] // self.pieces

    @property
    def double(self) -> bool:
        """Whether scales are quantised too."""
        return self.absmax_scale is not None

    def repacked(self, w: Float[Array, "*stack inner outer"]) -> "NormalFloat":
        """Another matrix of this shape, in blocks of the same length."""
        return normal_float(w, self.block, self.double)

    def cuttable(self) -> "NormalFloat":
        """The same matrix with its scales as they are: those of the second level do not lie in columns."""
        return NormalFloat(self.nf4, self.scales())

    def scales(self) -> Float32[Array, "*stack blocks outer"]:
        """The scale of each block."""
        if not self.double:
            return self.absmax
        *lead, blocks, outer = self.absmax.shape
        shared = jnp.repeat(self.absmax_scale[..., 0, :], SCALES, axis=-1)[..., : blocks * outer]
        shared = shared.reshape(*lead, outer, blocks).swapaxes(-1, -2)
        return jnp.take(dynamic_map(), self.absmax, axis=0, mode="clip") * shared + self.absmax_mean

    def unpacked(self) -> Float32[Array, "*stack inner outer"]:
        """The matrix, float32."""
        blocks = jnp.take(NF4, unpaired(self.nf4), axis=0, mode="clip").reshape(*self.absmax.shape[:-1], self.block, -1)
        return (blocks * self.scales()[..., None, :]).reshape(self.shape)


def normal_float(w: Float[Array, "*stack inner outer"], block: int | None = 64, double: bool = True) -> NormalFloat:
    """Round a matrix to the nearest codes of NF4; stacked matrices one after the other.

    Args:
        w: the matrix (inner, outer), or matrices stacked on leading axes.
        block: weights of a column that share a scale, their largest absolute value; null: all. It divides `inner`.
        double: quantise the scales as well: less their mean, to 8 bits in blocks of 256. Of blocks of 64 they then take
            0.127 bits per weight in the place of 0.5.

    Raises:
        ConfigError: a block that does not divide the columns, or columns of an odd length.
    """
    inner = w.shape[-2]
    block = inner if block is None else block
    if block < 1 or inner % block:
        near = max(n for n in range(1, max(1, min(block, inner)) + 1) if inner % n == 0)
        raise ConfigError(
            f"A block must divide the {inner} inputs of the matrix of shape {w.shape}, got {block}: {near} would do."
        )
    if inner % 2:
        raise ConfigError(f"Weights of 4 bits are kept in pairs of inputs, and this matrix has {inner}: use int8.")
    return _normal_float(w, block, double)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal_float(w: Array, block: int, double: bool) -> NormalFloat:
    if w.ndim > 2:  # what is in between exists for one matrix at a time
        return jax.lax.map(lambda one: _normal_float(one, block, double), w)
    inner, outer = w.shape
    blocks = w.astype(jnp.float32).reshape(-1, block, outer)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    codes = _nearest(NF4, blocks / _nonzero(absmax)[:, None]).reshape(inner, outer)
    return NormalFloat(paired(codes), *(doubly_quantised(absmax) if double else (absmax,)))


def nearest_nf4(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The nearest of NF4's values; of two as near, the smaller."""
    return jnp.take(NF4, _nearest(NF4, x), axis=0, mode="clip")


def nf4_pairs(values: Float32[Array, "inner outer"]) -> UInt8[Array, "half outer"]:
    """The codes of NF4's values, two rows in a byte."""
    return paired(_nearest(NF4, values))


def doubly_quantised(absmax: Float32[Array, "blocks outer"]) -> tuple[Array, Array, Array]:
    """Scales of blocks in 8 bits: `absmax`, `absmax_scale` and `absmax_mean` of a `NormalFloat`."""
    outer = absmax.shape[-1]
    mean = _mean(absmax)
    flat = (absmax - mean).T.reshape(-1)
    count = -(-flat.size // SCALES)
    shared = jnp.pad(flat, (0, count * SCALES - flat.size)).reshape(count, SCALES)
    scale = jnp.max(jnp.abs(shared), axis=1)
    second = _nearest(dynamic_map(), shared / _nonzero(scale)[:, None])
    second = second.reshape(-1)[: flat.size].reshape(outer, -1).T
    return second, scale[None], mean.reshape(1, 1)


def _nearest(values: np.ndarray, x: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Place of the nearest of some ascending values; of two as near, the smaller."""
    between = (values[:-1] + values[1:]) / 2
    return jnp.searchsorted(between, x, method="scan_unrolled").astype(jnp.uint8)


def _nonzero(scale: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Scales to divide by: a block of zeros stays one."""
    return jnp.where(scale == 0, 1.0, scale)


def _mean(x: Float32[Array, "blocks outer"]) -> Float32[Array, ""]:
    """A mean without the rounding of long sums: what a first mean is off by is added to it."""
    first = jnp.mean(x)
    return first + jnp.mean(x - first)


@functools.cache
def dynamic_map() -> np.ndarray:
    """The signed map of 8 bits that bitsandbytes has, ascending: 0, 1, and of both signs, for each of seven powers of
    ten from 1e-6 to 1, twice as many fractions as for the one before (Dettmers 2015, arXiv:1511.04561).
    """
    values = [0.0, 1.0]
    for power in range(7):
        ends = _ends(2**power)
        fractions = np.float32(10.0 ** (power - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2))
        values += [*fractions, *-fractions]
    return np.sort(np.asarray(values, np.float32))


def _ends(count: int) -> np.ndarray:
    """Ends of equal stretches from 0.1 to 1, as PyTorch rounds them: a step of float32, from the nearer side."""
    first, last = np.float32(0.1), np.float32(1)
    step, places = np.float64((last - first) / np.float32(count)), np.arange(count + 1)
    ends = np.where(places < (count + 1) // 2, first + step * places, last - step * (count - places))
    return ends.astype(np.float32)
