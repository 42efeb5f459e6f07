"""Safetensors files, read a tensor at a time and written in one pass.

A file is the length of a header (8 bytes, little-endian), the header (JSON: name → type, shape, place) and the bytes of
all tensors. Nothing in it is code. Headers are judged against the file's size when a file is opened, so that a file cut
short is told before anything is read.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from cramjax.errors import ModelError

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_WEIGHTS = ("F64", "F32", "F16", "BF16")
_HEADER_MAX = 100_000_000
"""Bytes; the limit of the safetensors library."""


class Tensors(Protocol):
    """Named arrays that are read one at a time."""

    @property
    def names(self) -> Sequence[str]:
        """Of all of them."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Of one, as it is stored."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One array, in memory of its own."""
        ...


@dataclass(frozen=True)
class ArrayTensors:
    """Arrays in memory as `Tensors`."""

    arrays: Mapping[str, np.ndarray]

    @property
    def names(self) -> Sequence[str]:
        """Of all of them."""
        return list(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one."""
        return self.arrays[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Of one."""
        return self.arrays[name].dtype

    def read(self, name: str) -> np.ndarray:
        """One array."""
        return self.arrays[name]

    def read_part(self, name: str, index: int) -> np.ndarray:
        """The element of a number along the first axis of one."""
        return self.arrays[name][index]


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte of the file."""
    count: int
    """Bytes."""


@dataclass(frozen=True)
class Extent:
    """Where a part of a tensor stands."""

    file: Path
    start: int
    """Byte of the file."""
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        """Size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SafetensorsFiles:
    """The tensors of one or several safetensors files; opened by `open_safetensors`."""

    places: Mapping[str, _Place]
    checksums: Mapping[str, int] = field(default_factory=dict)
    """CRC-32 of tensors' bytes, which `read` compares."""

    @property
    def names(self) -> Sequence[str]:
        """Of all tensors."""
        return list(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self.places[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Of one tensor."""
        return np.dtype(_DTYPES[self.places[name].dtype])

    def part(self, name: str, index: int) -> Extent:
        """Where the element of a number along the first axis of a tensor stands."""
        place, shape = self.places[name], self.shape(name)
        count = place.count // shape[0]
        return Extent(place.file, place.start + index * count, shape[1:], self.dtype(name))

    def read_part(self, name: str, index: int) -> np.ndarray:
        """The element of a number along the first axis of a tensor, in memory of its own.

        Raises:
            ModelError: the file has become shorter.
        """
        extent = self.part(name, index)
        array = aligned_empty(extent.shape, extent.dtype)
        with extent.file.open("rb") as file:
            file.seek(extent.start)
            if file.readinto(array.reshape(-1).view(np.uint8).data) != extent.bytes:
                raise ModelError(f"{extent.file} ends inside the tensor {name}: copy or download it again.")
        return array

    def all_of(self, name: str) -> Extent:
        """Where a tensor stands."""
        return Extent(self.places[name].file, self.places[name].start, self.shape(name), self.dtype(name))

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own.

        Raises:
            ModelError: the file has become shorter, or its bytes are not those that were written.
        """
        place = self.places[name]
        array = aligned_empty(place.shape, self.dtype(name))
        raw = array.reshape(-1).view(np.uint8).data
        with place.file.open("rb") as file:
            file.seek(place.start)
            if file.readinto(raw) != place.count:
                raise ModelError(f"{place.file} ends inside the tensor {name}: copy or download it again.")
        if name in self.checksums and zlib.crc32(raw) != self.checksums[name]:
            raise ModelError(
                f"{place.file} is damaged: the bytes of the tensor {name} are not those that were written. Copy it "
                "again, or make the model again."
            )
        return array


def open_safetensors(files: Iterable[Path], checksums: Mapping[str, int] | None = None) -> SafetensorsFiles:
    """Read the headers of safetensors files.

    Args:
        files: paths.
        checksums: CRC-32 of tensors' bytes, by name, to compare when they are read.

    Raises:
        ModelError: a file is missing, not what its name says, cut short, or repeats a tensor of another.
    """
    places: dict[str, _Place] = {}
    for path in files:
        for name, place in _header(path).items():
            if name in places:
                raise ModelError(f"the tensor {name} is in {places[name].file} and in {path}: remove one of them.")
            places[name] = place
    return SafetensorsFiles(places, checksums or {})


def _header(path: Path) -> dict[str, _Place]:
    def damaged(what: str) -> ModelError:
        return ModelError(f"{path} is not a whole safetensors file ({what}): copy or download it again.")

    if not path.is_file():
        raise ModelError(f"{path} does not exist: copy or download it.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _HEADER_MAX:
            raise damaged("it does not start with the length of a header")
        if 8 + length > size:
            raise damaged(f"its header ends at byte {8 + length:,}, and the file has {size:,}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            places = {
                name: _Place(path, item["dtype"], tuple(item["shape"]), 8 + length + start, stop - start)
                for name, item in header.items()
                for start, stop in [item["data_offsets"]]
            }
        except (ValueError, AttributeError, KeyError, TypeError):
            raise damaged("its header cannot be read") from None
    for name, place in places.items():
        if place.dtype not in _DTYPES:
            raise ModelError(
                f"{path}: the tensor {name} is stored as {place.dtype}, which cannot be read: convert the model to "
                "float32 or bfloat16."
            )
        if place.start + place.count > size:
            raise damaged(f"the tensor {name} ends at byte {place.start + place.count:,}, and the file has {size:,}")
        if place.count != math.prod(place.shape) * np.dtype(_DTYPES[place.dtype]).itemsize:
            raise damaged(f"the tensor {name} of shape {place.shape} has {place.count:,} bytes")
    return places


def require_weights(tensors: Tensors, name: str) -> None:
    """Refuse a tensor that does not hold floating point numbers.

    Raises:
        ModelError: it holds integers: the model is quantised, or the tensor is not a weight.
    """
    if _NAMES.get(tensors.dtype(name)) not in _WEIGHTS:
        raise ModelError(
            f"the tensor {name} is stored as {tensors.dtype(name)}, and weights are floating point numbers here: "
            "dequantise the model first (for example with its own library), or give its original."
        )


@dataclass(frozen=True)
class Output:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]
    """Makes the arrays that it is, one after another along the first axis."""

    @property
    def bytes(self) -> int:
        """Size."""
        return math.prod(self.shape) * self.dtype.itemsize


def whole(name: str, shape: Sequence[int], dtype: Any, make: Callable[[], np.ndarray]) -> Output:
    """A tensor to write that is made in one piece."""
    return Output(name, tuple(shape), np.dtype(dtype), lambda: [make()])


def shards(outputs: Sequence[Output], most: int) -> list[list[Output]]:
    """Tensors in groups of at most some bytes each; a larger tensor is a group of its own."""
    groups: list[list[Output]] = []
    room = 0
    for output in outputs:
        if not groups or output.bytes > room:
            groups.append([])
            room = most
        groups[-1].append(output)
        room -= output.bytes
    return groups


def write_safetensors(path: Path, outputs: Sequence[Output]) -> dict[str, int]:
    """Write a safetensors file, a piece of a tensor at a time.

    Args:
        path: of the file.
        outputs: what is written, in this order.

    Returns:
        The CRC-32 of each tensor's bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for output in outputs:
        dtype = _NAMES[output.dtype]
        header[output.name] = {"dtype": dtype, "shape": list(output.shape), "data_offsets": [at, at + output.bytes]}
        at += output.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksums = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for output in outputs:
            written, checksum = 0, 0
            for piece in output.pieces():
                raw = np.ascontiguousarray(piece, output.dtype).reshape(-1).view(np.uint8).data
                file.write(raw)
                written, checksum = written + len(raw), zlib.crc32(raw, checksum)
            assert written == output.bytes, f"{output.name}: {written} bytes of {output.bytes}"
            checksums[output.name] = checksum
    return checksums


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array that JAX takes on a CPU without copying it: its memory starts at a multiple of 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
