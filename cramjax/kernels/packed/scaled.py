"""Matrices with an adapter of two vectors: IA3 (Liu et al. 2022, arXiv:2205.05638)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cramjax.errors import ConfigError
from cramjax.kernels.dense import dense_by_constant
from cramjax.kernels.dense.packed import Packed, unpacked
from cramjax.kernels.mesh import whole


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Scaled(Packed):
    """A constant matrix whose inputs and results are multiplied by trained factors, or such matrices stacked on leading
    axes.

    Results are multiplied after a bias is added to them. Any part may be None where a tree holds the others.
    """

    base: Any
    """(..., inner, outer): an array or a packed matrix."""
    inputs: Any = None
    """(..., inner, 1): factors of inputs, float32; None: 1."""
    outputs: Any = None
    """(..., 1, outer - start): factors of results from column `start` to the last, float32; None: 1."""
    start: int = field(default=0, metadata={"static": True})
    """Columns whose results are as they are, before those that have factors."""

    trained: ClassVar[tuple[str, ...]] = ("inputs", "outputs")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: (..., inner, outer)."""
        if self.base is None:
            raise ValueError("factors without a base do not tell the shape of the matrix that they are for")
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """Of what `unpacked` gives: float32."""
        return jnp.dtype(jnp.float32)

    def multiply(self, x: Float[Array, "rows inner"], dtype: DTypeLike) -> Float[Array, "rows outer"]:
        """The product of rows with the matrix; see `Packed.multiply`."""
        x = x.astype(dtype)
        if self.inputs is not None:
            x = x * whole(self.inputs)[:, 0].astype(dtype)
        result = dense_by_constant(x, self.base, dtype=dtype)
        return result if self.outputs is None else result * self._factors().astype(dtype)

    def offset(self, bias: Float[Array, "*stack outer"]) -> Float[Array, "*stack outer"]:
        """The bias times the factors of results."""
        return bias if self.outputs is None else (bias * self._factors()).astype(bias.dtype)

    def unpacked(self) -> Float[Array, "*stack inner outer"]:
        """The matrix with the factors in it, float32."""
        matrix = unpacked(jax.tree.map(jax.lax.stop_gradient, self.base)).astype(jnp.float32)
        matrix = matrix if self.inputs is None else matrix * self.inputs
        return matrix if self.outputs is None else matrix * self._factors()[..., None, :]

    def _factors(self) -> Float[Array, "*stack outer"]:
        """Of all columns."""
        factors = whole(self.outputs)[..., 0, :]
        ones = jnp.ones((*factors.shape[:-1], self.start), factors.dtype)
        return jnp.concatenate([ones, factors], axis=-1)


def scaled(
    base: Float[Array, "*stack inner outer"] | Packed, *, inputs: bool = False, start: int | None = None
) -> Scaled:
    """A matrix with factors that change nothing yet: they are 1.

    Args:
        base: the matrix, or matrices stacked on leading axes, packed or not.
        inputs: multiply inputs.
        start: first column whose results are multiplied; None: none are.

    Raises:
        ConfigError: nothing is multiplied, or the matrix has no such column.
    """
    *lead, inner, outer = base.shape
    if not inputs and start is None:
        raise ConfigError("Factors multiply the inputs of a matrix or its results: choose one of them, or both.")
    if start is not None and not 0 <= start < outer:
        raise ConfigError(f"Factors start at one of {outer} columns, from 0, got {start}.")
    return Scaled(
        base,
        jnp.ones((*lead, inner, 1), jnp.float32) if inputs else None,
        None if start is None else jnp.ones((*lead, 1, outer - start), jnp.float32),
        start or 0,
    )
