"""Codes in GGUF files: blocks of 32 neighbouring inputs with a scale, and perhaps a least value, in float16.

Written are the codes that a matrix has. What differs is that scales are rounded to float16, and of groups with zeros
of their own, the product of scale and zero. A group of several blocks has its scale in each of them, and codes of 3 or
2 bits are among those of 4.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cramjax.errors import ModelError
from cramjax.formats.codes import Matrix, Scheme, matrix_of
from cramjax.formats.table import Piece
from cramjax.formats.tensors import Output
from cramjax.kernels.packed import Quantised, is_packed

BLOCK = 32
"""Inputs that share a scale."""
SCHEMES = {"Q8_0": Scheme(8, BLOCK, True), "Q4_0": Scheme(4, BLOCK, True), "Q4_1": Scheme(4, BLOCK, False)}
_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
_EIGHT = 8
"""What is added to a code of 4 bits or fewer."""


@dataclass(frozen=True)
class Blocks(Output):
    """A matrix to write, as bytes: (out, bytes of a row)."""

    kind: str = "Q4_0"
    """Of its blocks."""


def blocks_of(name: str, leaf: Any, piece: Piece, head_dim: int) -> Blocks:
    """The blocks of one matrix of theirs, cut out of a stack of ours.

    Args:
        name: of its tensor.
        leaf: packed.
        piece: where it stands.
        head_dim: of the model.

    Raises:
        ModelError: no blocks hold such a matrix.
    """
    kind = _kind(leaf, piece.path)
    inner, outer = piece.shape
    row = inner // BLOCK * _BYTES[kind]

    def make() -> np.ndarray:
        found = matrix_of(leaf, piece, head_dim)
        codes = found.codes.astype(np.int16) - 2 ** (leaf.bits - 1)
        blocks = codes.reshape(outer, -1, BLOCK)
        each = blocks.shape[1] // found.scale.shape[1]
        d, m = _stored(found.scale, None if leaf.zero is None else found.zero - 2 ** (leaf.bits - 1))
        if not np.isfinite(d).all() or (m is not None and not np.isfinite(m).all()):
            raise ModelError(f"{piece.path} has scales beyond float16, in which GGUF has them: mend the model first.")
        parts = [_bytes(d, each)] if m is None else [_bytes(d, each), _bytes(m, each)]
        if kind == "Q8_0":
            parts.append(blocks.astype(np.int8).view(np.uint8))
        else:
            low, high = np.split((blocks + _EIGHT).astype(np.uint8), 2, axis=-1)
            parts.append(low | high << 4)
        return np.concatenate(parts, axis=-1).reshape(outer, row)

    return Blocks(name, (outer, row), np.dtype(np.uint8), lambda: [make()], kind)


def written(leaf: Any) -> np.ndarray:
    """The numbers that a file has of a leaf of the parameters."""
    if not is_packed(leaf):
        return np.asarray(leaf)
    _kind(leaf, "a matrix")
    codes = np.asarray(leaf.codes()).astype(np.float32)
    groups = codes.reshape(*codes.shape[:-2], -1, leaf.group, codes.shape[-1])
    d, m = _stored(np.asarray(leaf.scale), None if leaf.zero is None else np.asarray(leaf.zero))
    scale = d.astype(np.float32)[..., None, :]
    if m is None:
        return (groups * scale).reshape(codes.shape)
    return (scale * (groups + _EIGHT) + m.astype(np.float32)[..., None, :]).reshape(codes.shape)


def blocks_read(data: np.ndarray, kind: str) -> Matrix:
    """A matrix of its blocks.

    Args:
        data: uint8 (out, bytes of a row).
        kind: of `SCHEMES`.
    """
    rows = data.reshape(len(data), -1, _BYTES[kind])
    d = np.ascontiguousarray(rows[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    if kind == "Q8_0":
        codes = rows[..., 2:].view(np.int8).astype(np.int16) + 128
        return Matrix(codes.astype(np.uint8).reshape(len(data), -1), d, np.full_like(d, 128))
    pairs = rows[..., -BLOCK // 2 :]
    codes = np.concatenate([pairs & 15, pairs >> 4], axis=-1)
    if kind == "Q4_0":
        return Matrix(codes.reshape(len(data), -1), d, np.full_like(d, _EIGHT))
    m = np.ascontiguousarray(rows[..., 2:4]).view(np.float16)[..., 0].astype(np.float32)
    # A block of one number, m, has no scale that says so: one step above the zero of a scale that is m.
    alike = d == 0
    codes = np.where(alike[..., None], 0, codes).astype(np.uint8)
    scale = np.where(alike, np.where(m == 0, 1, m), d)
    zero = np.where(alike, np.where(m == 0, 0, -1), -m / scale)
    return Matrix(codes.reshape(len(data), -1), scale, zero.astype(np.float32))


def _stored(scale: np.ndarray, zero: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales and least values, float16.

    Args:
        scale: of groups.
        zero: codes of 0, which are from -8 on.
    """
    with np.errstate(over="ignore"):  # infinities are refused where they are written
        d = scale.astype(np.float32).astype(np.float16)
        if zero is None:
            return d, None
        return d, (-(zero.astype(np.float32) + _EIGHT) * d.astype(np.float32)).astype(np.float16)


def _bytes(part: np.ndarray, each: int) -> np.ndarray:
    """(out, blocks, 2): a number for each of the blocks that a group is."""
    return np.repeat(part, each, axis=1)[..., None].view(np.uint8)


def _kind(leaf: Any, path: str) -> str:
    if not isinstance(leaf, Quantised) or leaf.group % BLOCK or (leaf.bits == 8 and leaf.zero is not None):
        what = type(leaf).__name__.lower()
        if isinstance(leaf, Quantised):
            grid = "symmetric" if leaf.zero is None else "asymmetric"
            what = f"{leaf.bits} bits, {grid}, in groups of {leaf.group}"
        raise ModelError(
            f"{path} is {what}, which no blocks of GGUF hold. They hold what `cramjax compress` makes with --bits 4, 3 "
            f"or 2, or 8 with --symmetric true, and with --group a multiple of {BLOCK} (32 or 64, say): compress the "
            "model so, or export its weights as floating point numbers (--dequantise)."
        )
    return "Q8_0" if leaf.bits == 8 else "Q4_0" if leaf.zero is None else "Q4_1"
