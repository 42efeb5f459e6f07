"""Arrays with many zeros in files: a bit for each number, and those that are not 0, where that takes fewer bytes.

Only files hold them so: they are read as the arrays that they are. What is 0 is so in all of its bits (-0.0 is not).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cramjax.errors import ModelError
from cramjax.formats.tensors import Output, SafetensorsFiles, aligned_empty

MASK, VALUES = ".mask", ".values"


def sparse_outputs(name: str, array: Any) -> list[Output] | None:
    """An array as the bits and the numbers that stand for it; None: it takes no more bytes as it is.

    Args:
        name: of the array.
        array: floating point numbers, stacked on the first axis.
    """
    dtype = np.dtype(array.dtype)
    if not _may_be(array):
        return None
    counts = [int(np.count_nonzero(_bits(array[index]))) for index in range(len(array))]
    row = -(-math.prod(array.shape[1:]) // 8)
    if not _smaller(array, sum(counts)):
        return None

    def masks() -> Any:
        return (np.packbits(_bits(array[index]) != 0)[None] for index in range(len(array)))

    def values() -> Any:
        for index in range(len(array)):
            own = np.asarray(array[index])
            yield own[_bits(own) != 0]

    return [
        Output(name + MASK, (len(array), row), np.dtype(np.uint8), masks),
        Output(name + VALUES, (sum(counts),), dtype, values),
    ]


def stored_bytes(array: Any) -> int:
    """Bytes that an array takes in a file."""
    if not _may_be(array):
        return array.nbytes
    count = sum(int(np.count_nonzero(_bits(array[index]))) for index in range(len(array)))
    return _bytes(array, count) if _smaller(array, count) else array.nbytes


def _may_be(array: Any) -> bool:
    # A bit for each number never pays where numbers are bytes; stacks of matrices are what is large.
    return array.ndim == 3 and np.dtype(array.dtype).itemsize > 1 and not np.issubdtype(array.dtype, np.integer)


def _bytes(array: Any, count: int) -> int:
    return len(array) * -(-math.prod(array.shape[1:]) // 8) + count * np.dtype(array.dtype).itemsize


def _smaller(array: Any, count: int) -> bool:
    return _bytes(array, count) < 0.9 * array.nbytes


def _bits(array: Any) -> np.ndarray:
    """The bits of each number as an integer."""
    own = np.ascontiguousarray(array)
    return own.view(f"u{own.dtype.itemsize}")


@dataclass(frozen=True)
class DenseTensors:
    """Tensors of files, those that are stored by their numbers that are not 0 as the arrays that they are."""

    files: SafetensorsFiles
    sparse: Mapping[str, Sequence[int]]
    """Shapes of these, by name."""

    @property
    def names(self) -> Sequence[str]:
        """Of all tensors."""
        parts = {name + part for name in self.sparse for part in (MASK, VALUES)}
        return [*(name for name in self.files.names if name not in parts), *self.sparse]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self.sparse[name]) if name in self.sparse else self.files.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Of one tensor."""
        return self.files.dtype(self._stored(name))

    def file(self, name: str) -> Path:
        """Where it is, or the numbers of it that are not 0."""
        return self.files.places[self._stored(name)].file

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own.

        Raises:
            ModelError: its bytes are not those that were written.
        """
        if name not in self.sparse:
            return self.files.read(name)
        shape = self.shape(name)
        masks, values = self.files.read(name + MASK), self.files.read(name + VALUES)
        array, size, at = aligned_empty(shape, values.dtype), math.prod(shape[1:]), 0
        if masks.shape != (shape[0], -(-size // 8)) or masks.dtype != np.uint8:
            raise self._damaged(name)
        for index, mask in enumerate(masks):
            there = np.unpackbits(mask, count=size).astype(bool)
            count = int(np.count_nonzero(there))
            if at + count > len(values):
                raise self._damaged(name)
            own = np.zeros(size, values.dtype)
            own[there] = values[at : at + count]
            array[index] = own.reshape(shape[1:])
            at += count
        if at != len(values):
            raise self._damaged(name)
        return array

    def read_part(self, name: str, index: int) -> np.ndarray:
        """The element of a number along the first axis of one tensor, in memory of its own.

        Raises:
            ModelError: its bytes are not those that were written.
        """
        if name not in self.sparse:
            return self.files.read_part(name, index)
        shape = self.shape(name)[1:]
        size = math.prod(shape)
        masks = self.files.read(name + MASK)
        there = np.unpackbits(masks[index], count=size).astype(bool)
        before, count = int(np.bitwise_count(masks[:index]).sum(dtype=np.int64)), int(np.count_nonzero(there))
        place = self.files.all_of(name + VALUES)
        if before + count > place.shape[0]:
            raise self._damaged(name)
        array = np.zeros(size, place.dtype)
        with place.file.open("rb") as file:
            file.seek(place.start + before * place.dtype.itemsize)
            array[there] = np.frombuffer(file.read(count * place.dtype.itemsize), place.dtype)
        return array.reshape(shape)

    def _stored(self, name: str) -> str:
        return name + VALUES if name in self.sparse else name

    def _damaged(self, name: str) -> ModelError:
        return ModelError(f"{self.file(name)}: the bits and the numbers of {name} do not fit: copy the model again.")
