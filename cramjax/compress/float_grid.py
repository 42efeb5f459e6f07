"""Grids of floating point numbers that weights are rounded to: NF4, FP8 (e4m3) and MXFP4, a scale for each group."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cramjax.compress.grid import POWER, SHRINKS, STEPS
from cramjax.kernels.packed import Float8, Microscaled, NormalFloat
from cramjax.kernels.packed.floats import (
    e2m1_pairs,
    e4m3_bits,
    float8_scale,
    nearest_e2m1,
    nearest_e4m3,
    power_of_two,
    shared_exponent,
)
from cramjax.kernels.packed.normal_float import doubly_quantised, nearest_nf4, nf4_pairs

_NEAREST: Mapping[str, Callable[[Array], Array]] = {
    "nf4": nearest_nf4,
    "fp8": nearest_e4m3,
    "mxfp4": nearest_e2m1,
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class FloatGrid:
    """A weight is near one of a kind's numbers times the scale of its group."""

    scale: Float[Array, "groups outer"]
    """What `stored` stands for, float32."""
    stored: tuple[Any, ...]
    """Parts of the leaf after its codes."""
    kind: str = field(metadata={"static": True})

    @property
    def groups(self) -> int:
        """Of a column's weights."""
        return len(self.scale)

    def rounded(self, w: Float[Array, "*rows outer"], group: Any) -> Float[Array, "*rows outer"]:
        """Weights of a group, each on the grid."""
        scale = self.scale[group]
        return _NEAREST[self.kind](w / _divisor(scale)) * scale

    def leaf(self, w: Float[Array, "inner outer"]) -> NormalFloat | Float8 | Microscaled:
        """A matrix rounded to the nearest numbers."""
        return _leaf(self, w)


@functools.partial(jax.jit, static_argnames=("kind", "group", "mse", "scale_dtype"))
def find_float_grid(w: Float[Array, "inner outer"], *, kind: str, group: int, mse: bool, scale_dtype: str) -> FloatGrid:
    """The grid of a matrix.

    With the scale of a group its largest weight is the kind's largest number. NF4 has scales quantised to 8 bits in
    turn, as QLoRA has it (Dettmers et al. 2023, arXiv:2305.14314, section 3), FP8 scales in `scale_dtype`, and MXFP4
    powers of two, with which the largest weight has the exponent of the largest number (OCP Microscaling Formats 1.0,
    section 6.3).

    Args:
        w: float32.
        kind: nf4, fp8 or mxfp4.
        group: weights of a column that share a scale; it divides `inner`.
        mse: take the scale as that of a smaller weight (MXFP4: or of twice the largest), where Σ|error|^2.4 is least.
        scale_dtype: precision of FP8's scales. Numbers are for the rounded scale.
    """
    groups = w.reshape(-1, group, w.shape[-1])
    largest = jnp.max(jnp.abs(groups), axis=1)
    shares = 2.0 ** jnp.arange(1, -3, -1) if kind == "mxfp4" else 1 - jnp.arange(SHRINKS) / STEPS

    def tried(number: Any, best: tuple[Array, Array]) -> tuple[Array, Array]:
        reach = largest * shares[number]
        scale = reach if kind == "nf4" else _scale(kind, _stored(kind, reach, scale_dtype))
        rounded = _NEAREST[kind](groups / _divisor(scale)[:, None]) * scale[:, None]
        error = jnp.sum(jnp.abs(rounded - groups) ** POWER, axis=1)
        better = error < best[0]
        return jnp.where(better, error, best[0]), jnp.where(better, reach, best[1])

    if mse:
        start = jnp.full(largest.shape, jnp.inf), largest
        largest = jax.lax.fori_loop(0, len(shares), tried, start)[1]
    stored = _stored(kind, largest, scale_dtype)
    return FloatGrid(_scale(kind, stored), stored, kind)


def _stored(kind: str, largest: Array, scale_dtype: str) -> tuple[Array, ...]:
    """What is stored of scales."""
    if kind == "nf4":
        return doubly_quantised(largest)
    return (float8_scale(largest, scale_dtype) if kind == "fp8" else shared_exponent(largest),)


def _scale(kind: str, stored: tuple[Array, ...]) -> Array:
    """What that stands for."""
    if kind == "nf4":
        return NormalFloat(None, *stored).scales()
    return stored[0].astype(jnp.float32) if kind == "fp8" else power_of_two(stored[0])


def _divisor(scale: Array) -> Array:
    return jnp.where(scale == 0, 1.0, scale)


@jax.jit
def _leaf(grid: FloatGrid, w: Array) -> NormalFloat | Float8 | Microscaled:
    numbers = _NEAREST[grid.kind](w.reshape(grid.groups, -1, w.shape[-1]) / _divisor(grid.scale)[:, None])
    numbers = numbers.reshape(w.shape)
    if grid.kind == "nf4":
        return NormalFloat(nf4_pairs(numbers), *grid.stored)
    if grid.kind == "fp8":
        return Float8(e4m3_bits(numbers), *grid.stored)
    return Microscaled(e2m1_pairs(numbers), *grid.stored)
