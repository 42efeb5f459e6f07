"""What may stand in the place of a matrix: a leaf of the parameters in another form than one array, which multiplies
itself.
"""

import abc
import math
from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any, ClassVar

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Packed(abc.ABC):
    """A matrix (inner, outer), or matrices stacked on leading axes: in fewer bytes, or with an adapter, or both.

    A kind of packed matrix is a frozen dataclass registered as a pytree. Its parts are arrays, or the packed matrix
    that it changes, with the leading axes of the matrix, so that scans, splits and indices take a layer out of all of
    them alike, and with as many axes as the matrix, so that devices divide them as they would the matrix. Parts may
    also be None, shapes or shardings, as leaves of any tree of parameters may.

    Parts are constants, without a gradient, but for those that are trained.
    """

    trained: ClassVar[tuple[str, ...]] = ()
    """Names of the parts that are trained parameters: they have gradients, and optimizers change them."""

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
        """The product of rows with one matrix, with a gradient to the rows and to the parts that are trained.

        Args:
            x: rows (rows, inner).
            dtype: precision of the operands and of the result. Sums are float32.
        """

    def multiply_groups(self, x: Float[Array, "rows inner"], groups: Any, dtype: DTypeLike) -> Array | None:
        """Products of groups of rows with the matrices of a stack, as of `cramjax.kernels.grouped.grouped`, where this
        kind of leaf has a way of its own; None: it has none, and each matrix multiplies its rows.
        """
        return None

    @abc.abstractmethod
    def unpacked(self) -> Float[Array, "*stack inner outer"]:
        """The matrix."""

    def read(self, x: Float[Array, "rows inner"]) -> Float[Array, "rows inner"]:
        """Rows as it multiplies them: themselves, unless it rounds them too."""
        return x

    def offset(self, bias: Float[Array, "*stack outer"]) -> Float[Array, "*stack outer"]:
        """What a bias adds to the product: itself, unless results are changed after it is added."""
        return bias

    @property
    def constant(self) -> tuple[str, ...]:
        """Names of the parts that are not trained."""
        parts = (field.name for field in fields(self) if not field.metadata.get("static"))  # pyright: ignore
        return tuple(name for name in parts if name not in self.trained)

    def only(self, names: Collection[str]) -> "Packed | None":
        """The same with None in the place of all parts but some; None, if it has none of these."""
        others = {name: None for name in (*self.trained, *self.constant) if name not in names}
        return replace(self, **others) if names else None  # pyright: ignore

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


def without_adapters(params: Any) -> Any:
    """Parameters with the base in the place of every matrix that has an adapter.

    Args:
        params: nested dicts of arrays and packed leaves.
    """
    return jax.tree.map(lambda leaf: leaf.base if is_adapter(leaf) else leaf, params, is_leaf=is_packed)


def is_adapter(leaf: Any) -> bool:
    """Whether a leaf of the parameters is a matrix (its `base`) with trained parts beside it."""
    return isinstance(leaf, Packed) and bool(leaf.trained)


def unpacked(w: Any) -> Float[Array, "*shape"]:
    """A leaf of the parameters as an array, packed or not."""
    return w.unpacked() if isinstance(w, Packed) else w
