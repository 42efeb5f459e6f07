"""A table of another library's tensors: where each parameter of ours is found, read both ways.

A family's table maps the path of a parameter (`blocks/attention/qkv/kernel`, whatever the pattern of the stack) to the
parts that it is made of, side by side along its last axis. Reading writes each layer into its place of the stacked
array, so that no more than a layer is in memory beside the model; writing cuts the same way.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from cramjax.errors import ModelError
from cramjax.formats.tensors import Output, Tensors, aligned_empty, require_weights, whole
from cramjax.kernels.packed import is_packed
from cramjax.model import Model, Weight
from cramjax.model.sizes import Sizes

Array = np.ndarray


@dataclass(frozen=True)
class Change:
    """How the numbers of a tensor differ from ours, both ways; both are given the head width."""

    read: Callable[[Array, int], Array]
    write: Callable[[Array, int], Array]


SAME = Change(lambda x, _: x, lambda x, _: x)

ONE_MORE = Change(lambda x, _: x.astype(np.float32) + 1, lambda x, _: x.astype(np.float32) - 1)
"""Gemma's norms multiply by 1 + w."""


def _swap(x: Array, head_dim: int) -> Array:
    return np.flip(x.reshape(-1, 2, head_dim // 2, *x.shape[1:]), axis=1).reshape(x.shape)


SWAPPED_HALVES = Change(_swap, _swap)
"""Rows of queries and keys whose rotation turns the other way (NanoChat): swap the halves of each head."""


def rows_after(count: int) -> Change:
    """A table with some unused rows before ours (RoBERTa's positions); they are written as zeros."""
    return Change(lambda x, _: x[count:], lambda x, _: np.pad(x, ((count, 0), (0, 0))))


@dataclass(frozen=True)
class Part:
    """One tensor of theirs."""

    name: str
    """`{}` stands for the layer, and a second one for the expert."""
    transposed: bool = False
    """Whether it is stored (out, in)."""
    change: Change = SAME
    twin: str | None = None
    """The name of a second tensor that is the same."""
    copy: str | None = None
    """A second name that it is written under too, and read from where the first is missing."""


Table = Mapping[str, tuple[Part, ...]]
"""Parts of each parameter; none at all: theirs has none, and computes as with zeros."""


def one(name: str, change: Change = SAME) -> tuple[Part, ...]:
    """A parameter that is one tensor as it stands."""
    return (Part(name, change=change),)


def linear(*names: str, change: Change = SAME) -> tuple[Part, ...]:
    """A matrix of one or several `nn.Linear`."""
    return tuple(Part(f"{name}.weight", transposed=True, change=change) for name in names)


def biases(*names: str, change: Change = SAME) -> tuple[Part, ...]:
    """The biases of one or several linear layers."""
    return tuple(Part(f"{name}.bias", change=change) for name in names)


def layer(ours: str, *theirs: str) -> dict[str, tuple[Part, ...]]:
    """Matrix and bias of a linear layer that is one or several of theirs."""
    return {f"{ours}/kernel": linear(*theirs), f"{ours}/bias": biases(*theirs)}


def norm(ours: str, theirs: str, change: Change = SAME) -> dict[str, tuple[Part, ...]]:
    """Weight and bias of a norm."""
    return {f"{ours}/weight": one(f"{theirs}.weight", change), f"{ours}/bias": one(f"{theirs}.bias")}


@dataclass(frozen=True)
class Piece:
    """Where one tensor of theirs stands in one parameter of ours."""

    path: str
    part: Part
    numbers: tuple[int, ...]
    """What stands in its name: the layer's number in the stack and, of an expert's matrix, the expert's; outside the
    blocks nothing."""
    index: tuple[int, ...] | None
    """Of the matrix in the stacked array: of its layer, and of the expert."""
    columns: slice
    """Of the last axis."""
    shape: tuple[int, ...]
    """Of the piece, without padding of the vocabulary."""

    @property
    def names(self) -> list[str]:
        """Of the tensor, and of its twin."""
        return [name.format(*self.numbers) for name in (self.part.name, self.part.twin) if name is not None]

    @property
    def written(self) -> list[str]:
        """All names that it is written under."""
        return [*self.names, *([] if self.part.copy is None else [self.part.copy.format(*self.numbers)])]


def pieces_of(path: str, weight: Weight, table: Table, model: Model) -> list[Piece]:
    """The tensors that a parameter is made of: layer by layer, and in each side by side.

    Args:
        path: of the parameter.
        weight: its declaration.
        table: where each parameter is found.
        model: whose parameter it is.

    Raises:
        ModelError: the table has none.
    """
    generic, slot, period = generic_path(path, model)
    parts = table.get(generic)
    if parts is None:
        raise ModelError(f"the format has no place for {path}.")
    stacked, shape = weight.repeats is not None, weight.real_shape(model.vocab_size)
    shape = shape[1:] if stacked else shape
    of_experts = len(shape) == 3 and weight.axes[0] == "expert"
    experts = [(number,) for number in range(shape[0])] if of_experts else [()]
    shape = shape[1:] if of_experts else shape
    widths = weight.widths if len(parts) > 1 and weight.widths else _widths(generic, model.sizes, parts, shape)
    pieces = []
    for index in range(model.config.layers // period) if stacked else (None,):
        for expert in experts:
            start = 0
            for part, width in zip(parts, widths if parts else (), strict=True):
                columns = slice(start, start + width)
                numbers = () if index is None else (index * period + slot, *expert)
                own = None if index is None else (index, *expert)
                pieces.append(Piece(path, part, numbers, own, columns, (*shape[:-1], width)))
                start += width
    return pieces


def generic_path(path: str, model: Model) -> tuple[str, int, int]:
    """A path without its place in the pattern (`blocks/2/mlp/…` → `blocks/mlp/…`), that place, and the period."""
    keys = path.split("/")
    if keys[0] == "blocks" and keys[1].isdigit():
        return "/".join(["blocks", *keys[2:]]), int(keys[1]), model.config.layers // model.repeats
    return path, 0, 1


def _widths(path: str, sizes: Sizes, parts: Sequence[Part], shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(parts) == 1:
        return shape[-1:]
    return sizes.qkv if "/qkv/" in path else sizes.up


def flatten(params: PyTree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Path and leaf of every parameter."""
    for key, value in params.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from flatten(value, path)
        else:
            yield path, value


def unflatten(leaves: Mapping[str, Any], like: PyTree, prefix: str = "") -> PyTree:
    """The tree of `like` with leaves by path."""
    tree = {}
    for key, value in like.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        tree[key] = unflatten(leaves, value, path) if isinstance(value, Mapping) else leaves[path]
    return tree


def read_params(
    tensors: Tensors,
    table: Table,
    model: Model,
    *,
    ignored: Sequence[str] = (),
    prefix: str = "",
    put: Callable[[str, Array], Any] | None = None,
    keep: Callable[[Weight, Sequence[tuple[Piece, Sequence[str]]]], Any] | None = None,
) -> PyTree:
    """The parameters of a model from another library's tensors; the vocabulary's padding is zeros.

    Args:
        tensors: theirs.
        table: where each parameter is found.
        model: of the configuration that theirs implies.
        ignored: parts of names of tensors that the model does without.
        prefix: what names start with, and may lack all together.
        put: places a finished array, given its path. Default: on the default device, on a CPU without a copy.
        keep: makes a packed leaf of a parameter, given its pieces and the names of their tensors, or None; see
            `cramjax.formats.codes.keeps`. Default: all are arrays.

    Raises:
        ModelError: a tensor is missing, has another shape, is not of numbers, or has no place.
    """
    names = set(tensors.names)
    bare = bool(prefix) and not any(name.startswith(prefix) for name in names)
    unread = set(names)
    put = put or (lambda _, array: jax.device_put(array, may_alias=True))
    leaves = {}
    abstract = model.abstract_params()
    declared = dict(flatten(model.weights))
    for path, leaf in flatten(abstract):
        pieces = pieces_of(path, declared[path], table, model)
        called = [(piece, _names_of(piece, names, prefix if bare else "", path)) for piece in pieces]
        unread.difference_update(*(own for _, own in called))
        if keep is not None and (kept := keep(declared[path], called)) is not None:
            leaves[path] = jax.tree.map(partial(put, path), kept)
            continue
        # 1 + w in bfloat16 would lose most of w.
        exact = any(piece.part.change is ONE_MORE for piece in pieces)
        array = aligned_empty(leaf.shape, np.float32 if exact else leaf.dtype)
        if not pieces or declared[path].real_shape(model.vocab_size) != leaf.shape:
            array[...] = 0
        for piece, own in called:
            _fill(array, piece, tensors, own, model.sizes.head_dim)
        leaves[path] = put(path, array)
        del array
    strangers = sorted(name for name in unread if not any(part in name for part in ignored))
    if strangers:
        more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
        raise ModelError(
            f"the model's files have tensors that its configuration has no place for: {', '.join(strangers[:5])}{more}."
        )
    return unflatten(leaves, abstract)


def _names_of(piece: Piece, names: Container[str], removed: str, path: str) -> list[str]:
    """What the tensors that a piece is read from are called.

    Raises:
        ModelError: one is missing.
    """
    wanted = piece.names
    if piece.part.copy is not None and wanted[0] not in names:
        wanted = piece.written[-1:]
    called = [_called(name.removeprefix(removed), names) for name in wanted]
    if missing := [name for name in called if name not in names]:
        raise ModelError(f"the model's files have no tensor {missing[0]}, which {path} is read from.")
    return called


def _called(name: str, names: Container[str]) -> str:
    """What a tensor is called: files of BERT's first years have other names for the parts of a LayerNorm."""
    older = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    return older if name not in names and older in names else name


def _fill(array: Array, piece: Piece, tensors: Tensors, called: Sequence[str], head_dim: int) -> None:
    for name in called:
        require_weights(tensors, name)
    name, stored = called[0], tensors.shape(called[0])
    wanted = _stored_shape(piece, head_dim)
    if stored != wanted:
        raise ModelError(f"the tensor {name} must have shape {wanted} for {piece.path}, got {stored}.")
    raw = tensors.read(name)
    if any(not np.array_equal(raw, tensors.read(twin)) for twin in called[1:]):
        raise ModelError(
            f"the tensors {' and '.join(called)} differ, and a gate with ReLU has no counterpart here, unless they are "
            "the same (ReLU²)."
        )
    found = piece.part.change.read(raw, head_dim)
    where = array if piece.index is None else array[piece.index]
    rows = tuple(slice(0, size) for size in piece.shape[:-1])
    where[(*rows, piece.columns)] = found.T if piece.part.transposed else found


def _stored_shape(piece: Piece, head_dim: int) -> tuple[int, ...]:
    """Of their tensor: a change may add rows, so it is asked with an array that takes no memory."""
    shape = tuple(reversed(piece.shape)) if piece.part.transposed else piece.shape
    return piece.part.change.write(np.broadcast_to(np.zeros((), np.float32), shape), head_dim).shape


def write_params(
    params: PyTree, table: Table, model: Model, packed: Callable[[Any, Piece, str], list[Output]] | None = None
) -> list[Output]:
    """Parameters as another library's tensors, each made when it is asked for; the vocabulary's padding is cut off.

    Args:
        params: of the model.
        table: where each parameter goes.
        model: of the configuration that theirs will imply.
        packed: the tensors of a piece of a packed leaf, given that, the piece and the name of theirs.

    Raises:
        ModelError: a parameter that theirs has not, and computes as with zeros, is none.
    """
    outputs, declared = [], dict(flatten(model.weights))
    for path, leaf in flatten(params):
        pieces = pieces_of(path, declared[path], table, model)
        if not pieces and np.any(np.asarray(leaf)):
            raise ModelError(
                f"{path} is not 0, and the class computes without: an export is exact or none (of experts: train with "
                "model.experts.balance=loss or none, whose routers have no biases)."
            )
        for piece in pieces:
            for name in piece.written:
                if is_packed(leaf):
                    assert packed is not None, f"{path} is packed"
                    outputs += packed(leaf, piece, name)
                else:
                    outputs.append(_output(leaf, piece, name, model.sizes.head_dim))
    return sorted(outputs, key=lambda output: output.name)


def _output(leaf: Any, piece: Piece, name: str, head_dim: int) -> Output:
    def make() -> Array:
        array = np.asarray(leaf if piece.index is None else leaf[piece.index])
        array = array[(*(slice(0, size) for size in piece.shape[:-1]), piece.columns)]
        array = array.T if piece.part.transposed else array
        return piece.part.change.write(array, head_dim).astype(leaf.dtype)

    return whole(name, _stored_shape(piece, head_dim), np.dtype(leaf.dtype), make)
