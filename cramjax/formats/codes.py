"""Matrices of codes between other people's files and packed leaves of ours, both ways.

A format that holds codes gives them as a `Matrix`, and takes one; what it is called in files is its own affair.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from cramjax.errors import ModelError
from cramjax.formats.table import Piece
from cramjax.formats.tensors import Tensors
from cramjax.kernels.packed import Quantised, coded, quantisation_refusal
from cramjax.model import Weight


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantised."""

    bits: int
    group: int | None
    """Inputs that share a scale; None: all."""
    symmetric: bool


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix as `nn.Linear` has it: weight = (code - zero) · scale."""

    codes: np.ndarray
    """uint8 (out, in), from 0 to 2^bits - 1."""
    scale: np.ndarray
    """(out, groups)."""
    zero: np.ndarray
    """Codes of 0, float32 (out, groups); whole numbers, unless the format has them otherwise."""


@runtime_checkable
class CodedTensors(Tensors, Protocol):
    """Tensors of which some are quantised matrices, read as floating point numbers or as codes."""

    def scheme(self, name: str) -> Scheme | None:
        """How one is quantised; None: it is not, or in a way that no leaf of ours has."""
        ...

    def matrix(self, name: str) -> Matrix:
        """One that has a scheme."""
        ...


def matrix_of(leaf: Quantised, piece: Piece, head_dim: int) -> Matrix:
    """One matrix of theirs, cut out of a stack of ours.

    Raises:
        ModelError: theirs is stored the other way round, as GPT-2's is.
    """
    if not piece.part.transposed:
        raise ModelError(f"{piece.path}: these formats have matrices of nn.Linear, which this class does not use.")
    own = jax.tree.map(lambda part: jnp.asarray(part if piece.index is None else part[piece.index]), leaf)

    def theirs(part: Any) -> np.ndarray:
        return piece.part.change.write(np.asarray(part)[:, piece.columns].T, head_dim)

    half = 2 ** (leaf.bits - 1)
    codes = theirs(own.codes()).astype(np.int16) + half
    scale = theirs(own.scale)
    zero = np.full(scale.shape, half) if own.zero is None else theirs(own.zero).astype(np.float32) + half
    return Matrix(codes.astype(np.uint8), scale, zero.astype(np.float32))


Keep = Callable[[Weight, Sequence[tuple[Piece, Sequence[str]]]], Quantised | None]


def keeps(tensors: Tensors, head_dim: int) -> Keep | None:
    """What makes packed leaves of the codes in some files; None: they have none.

    Args:
        tensors: theirs.
        head_dim: of the model.

    Returns:
        Given the declaration of a parameter, its pieces and the names of their tensors: the leaf, in host memory; None
        where the pieces are not all matrices quantised alike, or no leaf of ours holds such codes.
    """
    if not isinstance(tensors, CodedTensors):
        return None
    read = tensors

    def keep(weight: Weight, pieces: Sequence[tuple[Piece, Sequence[str]]]) -> Quantised | None:
        plain = weight.role == "matrix" and all(p.part.transposed and len(names) == 1 for p, names in pieces)
        schemes = {read.scheme(names[0]) for _, names in pieces} if plain else {None}
        scheme = schemes.pop() if len(schemes) == 1 else None
        if scheme is None or quantisation_refusal(weight.shape, scheme.bits, scheme.group or weight.shape[-2]):
            return None
        return _leaf(read, scheme, weight, pieces, head_dim)

    return keep


def _leaf(
    tensors: CodedTensors, scheme: Scheme, weight: Weight, pieces: Sequence[tuple[Piece, Sequence[str]]], head_dim: int
) -> Quantised:
    *lead, inner, outer = weight.stacked_shape
    groups = 1 if scheme.group is None else inner // scheme.group
    codes, scale = np.empty((*lead, inner, outer), np.int8), np.empty((*lead, groups, outer), np.float32)
    zero, half = np.empty_like(scale), 2 ** (scheme.bits - 1)
    for piece, (name,) in pieces:
        found = tensors.matrix(name)
        if found.codes.shape != piece.shape[::-1]:
            raise ModelError(
                f"the tensor {name} must have shape {piece.shape[::-1]} for {piece.path}, got {found.codes.shape}."
            )
        centred = (found.codes.astype(np.int16) - half).astype(np.int8)
        for whole, part in ((codes, centred), (scale, found.scale), (zero, found.zero - half)):
            where = whole if piece.index is None else whole[piece.index]
            where[:, piece.columns] = piece.part.change.read(part, head_dim).T
    flat = [
        coded(jnp.asarray(own), jnp.asarray(s), None if scheme.symmetric else jnp.asarray(z), scheme.bits)
        for own, s, z in zip(
            codes.reshape(-1, inner, outer),
            scale.reshape(-1, groups, outer),
            zero.reshape(-1, groups, outer),
            strict=True,
        )
    ]
    return jax.tree.map(lambda *parts: np.stack(parts).reshape(*lead, *parts[0].shape), *flat)
