"""What a block's matrices are multiplied with: seen through leaves that stand in their places, and write it down.

A matrix whose inputs are known already is given them, whatever comes: what would have computed what comes is then dead
code, and a block walked part by part costs little more than one pass. Rows of experts lie as their router chose, and
another program may round its scores otherwise: so a choice is known like inputs are, from the first program that makes
it on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from cramjax.kernels.dense import dense
from cramjax.kernels.dense.packed import Packed, unpacked
from cramjax.kernels.grouped import Groups, grouped
from cramjax.model import Stack
from cramjax.model.experts import Chooser
from cramjax.model.layers import Context


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """What a matrix, or the matrices of a block's experts, are multiplied with."""

    rows: Float[Array, "rows inner"]
    groups: Groups | None = None
    """Which rows are of which expert; None: it is one matrix. Rows of nobody are 0."""
    choices: dict[str, Int[Array, "tokens active"]] = field(default_factory=dict)
    """Experts of each token, by the names of routers that chose before this, and were not given a choice."""


class _Seen:
    """What leaves write down; the same only as itself, as a tree's structure wants it."""

    def __init__(self) -> None:
        self.inputs: dict[str, Inputs] = {}
        self.choices: dict[str, Array] = {}

    def write(self, name: str, rows: Array, groups: Groups | None = None) -> None:
        """A matrix's inputs, and the choices before them."""
        self.inputs[name] = Inputs(rows, groups, dict(self.choices))


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
        self.seen.write(self.name, rows)
        return dense(rows, self.base, dtype=dtype)

    def multiply_groups(self, x: Float[Array, "rows inner"], groups: Any, dtype: DTypeLike) -> Array:
        """The products of experts, as of their matrices themselves."""
        rows = x if self.rows is None else self.rows
        self.seen.write(self.name, rows, groups)
        return grouped(rows, self.base, groups, dtype=dtype)

    def unpacked(self) -> Float[Array, "*stack inner outer"]:
        """The matrix."""
        return unpacked(self.base)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class _WatchedBias(Chooser):
    """A router's bias that writes the choice down, or gives a known one back."""

    base: Any
    choice: Any
    """In the place of the one that comes; None: that one."""
    name: str = field(metadata={"static": True})
    seen: _Seen = field(metadata={"static": True})

    def __getitem__(self, index: Any) -> "_WatchedBias":
        """The leaf itself: a step's parameters have no leading axes."""
        assert index is Ellipsis, "all of it"
        return self

    def taken(self, chosen: Int[Array, "tokens active"]) -> Int[Array, "tokens active"]:
        """The known choice, or the one that comes."""
        if self.choice is not None:
            return self.choice
        self.seen.choices[self.name] = chosen
        return chosen


def watched_block(
    stack: Stack,
    block: PyTree,
    x: Float[Array, "batch seq embed"],
    context: Context,
    repeat: int | Array,
    known: Mapping[str, Float[Array, "rows inner"] | Int[Array, "tokens active"]],
) -> tuple[Float[Array, "batch seq embed"], dict[str, Inputs]]:
    """One step of a walk, with the inputs of its matrices.

    Args:
        stack: the model.
        block: parameters of this step, without the axis of repeats.
        x: residual stream.
        context: from `Stack.embed`.
        repeat: which step this is (it may be traced).
        known: inputs by the names of matrices that are given them, and choices by those of routers.

    Returns:
        The residual stream after it, and the inputs of each matrix by its name (`attention/qkv/kernel`), in the order
        that the matrices are read in.
    """
    seen = _Seen()

    def watched(path: Any, weight: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        kind = {"matrix": _Watched, "balance": _WatchedBias}.get(weight.role)
        return leaf if kind is None else kind(leaf, known.get(name), name, seen)

    own = jax.tree_util.tree_map_with_path(watched, stack.weights["blocks"], block)
    return stack.block(own, x, context, repeat), seen.inputs


def to_know(found: Mapping[str, Inputs]) -> dict[str, Array]:
    """What the programs after one are to be given: inputs by the names of matrices, and the choices before them by
    those of routers.

    Args:
        found: what one program gave.
    """
    choices = {name: choice for own in found.values() for name, choice in own.choices.items()}
    return choices | {name: own.rows for name, own in found.items()}


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
