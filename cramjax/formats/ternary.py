"""Ternary matrices in files: by the entropy code of their values, which is shorter than the words that memory holds.

Only files hold them so: what is read is a `Coded` again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cramjax.errors import ModelError
from cramjax.formats.tensors import Output, whole
from cramjax.kernels.coding import entropy
from cramjax.kernels.packed import Coded, read_coded, write_coded

_PARTS = ("words", "starts", "states", "frequencies")
LEVELS = ".levels"


def ternary_outputs(name: str, leaf: Coded) -> list[Output]:
    """What stands for a matrix, or a stack of them, in a file; its levels are there as they are.

    Args:
        name: of the matrix.
        leaf: the matrix.
    """
    values = np.moveaxis(read_coded(leaf), -2, -1)
    coded = entropy.encode(values.reshape(-1, values.shape[-1]))
    levels = np.asarray(leaf.levels)
    outputs = [whole(name + LEVELS, levels.shape, levels.dtype, lambda: levels)]
    for part in _PARTS:
        array = getattr(coded, part)
        outputs.append(whole(_stored(name, part), array.shape, array.dtype, lambda array=array: array))
    return outputs


def _stored(name: str, part: str) -> str:
    return f"{name}.entropy_{part}"


@dataclass(frozen=True)
class TernaryTensors:
    """Tensors of files, with the words of matrices that are stored by an entropy code."""

    files: Any
    """`DenseTensors`, or another of its kind."""
    coded: Mapping[str, Mapping[str, int]]
    """Of each matrix: `inner`, and how many `words` a matrix of its stack has room for."""

    @property
    def names(self) -> Sequence[str]:
        """Of all tensors."""
        stored = {_stored(name, part) for name in self.coded for part in _PARTS}
        return [*(name for name in self.files.names if name not in stored), *self._made]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        if name not in self._made:
            return self.files.shape(name)
        matrix, part = self._made[name]
        *lead, _, outer = self.files.shape(matrix + LEVELS)
        return (*lead, 1, self.coded[matrix]["words"] if part == "words" else outer + 1)

    def dtype(self, name: str) -> np.dtype:
        """Of one tensor."""
        if name not in self._made:
            return self.files.dtype(name)
        return np.dtype(np.uint16 if self._made[name][1] == "words" else np.int32)

    def file(self, name: str) -> Path:
        """Where it is."""
        return self.files.file(_stored(self._made[name][0], "words") if name in self._made else name)

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own.

        Raises:
            ModelError: its bytes are not those that were written.
        """
        if name not in self._made:
            return self.files.read(name)
        matrix, part = self._made[name]
        if matrix not in self._read:  # both parts come of one
            self._read.clear()
            self._read[matrix] = self._decoded(matrix)
        return np.asarray(getattr(self._read[matrix], part))

    @cached_property
    def _made(self) -> dict[str, tuple[str, str]]:
        """Tensors that no file has, with the matrix and the part that they are."""
        return {f"{name}.{part}": (name, part) for name in self.coded for part in ("words", "starts")}

    @cached_property
    def _read(self) -> dict[str, Coded]:
        return {}

    def _decoded(self, name: str) -> Coded:
        parts = {part: self.files.read(_stored(name, part)) for part in _PARTS}
        levels, inner = self.files.read(name + LEVELS), int(self.coded[name]["inner"])
        *lead, _, outer = levels.shape
        try:
            rows = entropy.decode(entropy.Coded(**parts), int(np.prod(lead, dtype=int)) * outer, inner)
            made = write_coded(np.moveaxis(rows.reshape(*lead, outer, inner), -2, -1), levels)
        except (ValueError, IndexError):
            made = None
        if made is None or tuple(made.words.shape) != self.shape(f"{name}.words"):
            raise ModelError(f"{self.file(name + '.words')}: the code of {name} is damaged: copy the model again.")
        return made
