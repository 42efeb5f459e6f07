"""What a block's matrices are multiplied with: seen through leaves that stand in their places, and write it down.

A matrix whose inputs are known already is given them, whatever comes: what would have computed what comes is then dead
code, and a block walked part by part costs little more than one pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from cramjax.kernels.dense import dense
from cramjax.kernels.dense.packed import Packed, unpacked
from cramjax.kernels.grouped import Groups, grouped
from cramjax.model import Stack
from cramjax.model.layers import Context


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """What a matrix, or the matrices of a block's experts, are multiplied with."""

    rows: Float[Array, "rows inner"]
    groups: Groups | None = None
    """Which rows are of which expert; None: it is one matrix. Rows of nobody are 0."""


class _Seen(dict[str, Inputs]):
    """Inputs by the names of matrices; the same only as itself, as a tree's structure wants it."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]
    __eq__ = object.__eq__


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class _Watched(Packed):
    """A matrix that writes down its inputs; traced once, within one function."""

    base: Any
    rows: Any
    """Inputs in the place of those that come; None: those that come."""
    name: str = field(metadata={"static": True})
    seen: _Seen = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """Of the matrix."""
        return self.base.dtype

    def multiply(self, x: Float[Array, "rows inner"], dtype: DTypeLike) -> Float[Array, "rows outer"]:
        """The product, as of the matrix itself."""
        rows = x if self.rows is None else self.rows
        self.seen[self.name] = Inputs(rows)
        return dense(rows, self.base, dtype=dtype)

    def multiply_groups(self, x: Float[Array, "rows inner"], groups: Any, dtype: DTypeLike) -> Array:
        """The products of experts, as of their matrices themselves."""
        rows = x if self.rows is None else self.rows
        self.seen[self.name] = Inputs(rows, groups)
        return grouped(rows, self.base, groups, dtype=dtype)

    def unpacked(self) -> Float[Array, "*stack inner outer"]:
        """The matrix."""
        return unpacked(self.base)


def watched_block(
    stack: Stack,
    block: PyTree,
    x: Float[Array, "batch seq embed"],
    context: Context,
    repeat: int | Array,
    known: Mapping[str, Float[Array, "rows inner"]],
) -> tuple[Float[Array, "batch seq embed"], dict[str, Inputs]]:
    """One step of a walk, with the inputs of its matrices.

    Args:
        stack: the model.
        block: parameters of this step, without the axis of repeats.
        x: residual stream.
        context: from `Stack.embed`.
        repeat: which step this is (it may be traced).
        known: inputs by the names of matrices that are given them.

    Returns:
        The residual stream after it, and the inputs of each matrix by its name (`attention/qkv/kernel`), in the order
        that the matrices are read in.
    """
    seen = _Seen()

    def watched(path: Any, weight: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return _Watched(leaf, known.get(name), name, seen) if weight.role == "matrix" else leaf

    own = jax.tree_util.tree_map_with_path(watched, stack.weights["blocks"], block)
    return stack.block(own, x, context, repeat), dict(seen)


def matrix_names(stack: Stack) -> tuple[str, ...]:
    """Names of the matrices of a step, in the order that they are read in."""
    params = stack.abstract_params()
    step = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params["blocks"])
    tokens = jax.ShapeDtypeStruct((1, min(8, stack.sequence_length)), "int32")

    def run(params: PyTree, step: PyTree, tokens: Array) -> Sequence[Array]:
        names.extend(watched_block(stack, step, *stack.embed(params, tokens), 0, {})[1])
        return ()

    names: list[str] = []
    jax.eval_shape(run, params, step, tokens)
    return tuple(names)
