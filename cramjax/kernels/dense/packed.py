"""What may stand in the place of a matrix: a leaf of the parameters that is smaller than the matrix, and multiplies
itself.
"""

import abc
import math
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Packed(abc.ABC):
    """A matrix (inner, outer), or matrices stacked on leading axes, in fewer bytes. A constant: it has no gradient.

    A kind of packed matrix is a frozen dataclass registered as a pytree. Its parts are arrays with the leading axes of
    the matrix, so that scans, splits and indices take a layer out of all of them alike, and with as many axes as the
    matrix, each as long as the matrix's or a divisor of it, so that devices divide them as they would the matrix.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: (..., inner, outer)."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """Of what `unpacked` gives."""

    @abc.abstractmethod
    def multiply(self, x: Float[Array, "rows inner"], dtype: DTypeLike) -> Float[Array, "rows outer"]:
        """The product of rows with one matrix, with a gradient to the rows alone.

        Args:
            x: rows (rows, inner).
            dtype: precision of the operands and of the result. Sums are float32.
        """

    @abc.abstractmethod
    def unpacked(self) -> Float[Array, "*stack inner outer"]:
        """The matrix."""

    @property
    def ndim(self) -> int:
        """Axes of the matrix."""
        return len(self.shape)

    @property
    def bytes(self) -> int:
        """Of all parts."""
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> "Packed":
        """The matrix at an index of the leading axes."""
        return jax.tree.map(lambda part: part[index], self)


def is_packed(leaf: Any) -> bool:
    """Whether a leaf of the parameters is packed: the `is_leaf` of walks that are to see it whole."""
    return isinstance(leaf, Packed)


def unpacked(w: Any) -> Float[Array, "*shape"]:
    """A leaf of the parameters as an array, packed or not."""
    return w.unpacked() if isinstance(w, Packed) else w
