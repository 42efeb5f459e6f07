"""The disk: a model's files read a part at a time, and scratch files, into memory that is used again.

Weights and activations that have been read are not kept in the operating system's cache: they would push out what is
used sooner, and make the disk's speed a matter of luck. Keys and values, read in small pieces that grow by a token, are
left to it: it keeps them in memory that nobody wants, beyond the limits that were given, and gives that back.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cramjax.errors import RunError
from cramjax.formats.tensors import Extent
from cramjax.show.numbers import format_bytes

ALIGNMENT = 64
"""Bytes: of what JAX takes on a CPU without copying it."""
_PIECE = 8 << 20
"""Bytes read at once."""


def aligned(size: int) -> int:
    """Bytes that something takes where the next one is to be aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def buffer(size: int) -> np.ndarray:
    """Zeros, aligned; none of the memory is taken before it is written."""
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def raw_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8)


class Files:
    """Files that stay open while parts of them are read."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._lock = threading.Lock()

    def read(self, extent: Extent, out: np.ndarray) -> None:
        """Read a part of a tensor.

        Args:
            extent: where it is.
            out: its bytes.
        """
        with self._lock:
            if extent.file not in self._open:
                self._open[extent.file] = extent.file.open("rb", buffering=0)
        read_at(self._open[extent.file].fileno(), extent.start, out, extent.file)

    def close(self) -> None:
        """Close them."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def read_at(number: int, start: int, out: np.ndarray, name: Any, *, drop: bool = True) -> None:
    """Fill memory from a place of an open file.

    Args:
        number: the file's descriptor.
        start: byte of the file.
        out: bytes, contiguous.
        name: of the file, for the message.
        drop: let the operating system forget them.

    Raises:
        RunError: the file ends before.
    """
    view, done = out.data, 0
    while done < len(view):
        count = os.preadv(number, [view[done : done + _PIECE]], start + done)
        if not count:
            raise RunError(f"{name} ends before byte {start + len(view):,}: has it been changed? Run the same again.")
        done += count
    if drop and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(number, start, len(view), os.POSIX_FADV_DONTNEED)


@dataclass
class ScratchFile:
    """A file of a size, of which parts are written and read."""

    path: Path
    file: Any
    """Open, without a buffer."""

    @property
    def number(self) -> int:
        """Its descriptor."""
        return self.file.fileno()

    def write(self, start: int, array: np.ndarray) -> None:
        """Write a contiguous array at a byte."""
        view, done = raw_bytes(np.ascontiguousarray(array)).data, 0
        with disk_errors(self.path.parent):
            while done < len(view):
                done += os.pwrite(self.number, view[done:], start + done)

    def read(self, start: int, out: np.ndarray, *, drop: bool = True) -> None:
        """Fill a contiguous array from a byte; `drop` as of `read_at`."""
        read_at(self.number, start, raw_bytes(out), self.path, drop=drop)


class Scratch:
    """A directory for files that exist as long as something runs."""

    def __init__(self, parent: Path):
        """Make one below a directory, which must be there.

        Raises:
            RunError: it cannot be written.
        """
        with disk_errors(parent):
            self._path = Path(tempfile.mkdtemp(prefix=".cramjax-", dir=parent))
        self._parent, self._files = parent, list[ScratchFile]()

    def file(self, name: str, size: int) -> ScratchFile:
        """A file with room for so many bytes, which are the file's from now on.

        Raises:
            RunError: the disk has no such room.
        """
        path = self._path / name
        with disk_errors(self._parent, size):
            path.touch(mode=0o600, exist_ok=False)
            made = ScratchFile(path, path.open("r+b", buffering=0))
            self._files.append(made)
            if size:
                os.posix_fallocate(made.number, 0, size) if hasattr(os, "posix_fallocate") else os.truncate(path, size)
        return made

    def close(self) -> None:
        """Remove everything."""
        for file in self._files:
            file.file.close()
        self._files.clear()
        shutil.rmtree(self._path, ignore_errors=True)


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Scratch]:
    """A scratch directory that is removed at the end, whatever happens."""
    made = Scratch(parent)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def disk_errors(directory: Path, needed: int | None = None) -> Iterator[None]:
    """Say what the disk refused, in one sentence.

    Raises:
        RunError: what was an `OSError`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(f"--disk {directory} cannot be used: {error.strerror}. Give another directory.") from error
        size = "" if needed is None else f" for {format_bytes(needed)}"
        free = format_bytes(free_bytes(directory))
        raise RunError(
            f"--disk {directory} has no room{size} ({free} are free): free some, give another directory, or more "
            "--host_memory. Nothing is left there."
        ) from error


def free_bytes(directory: Path) -> int:
    """Bytes that can be written below a directory.

    Raises:
        RunError: there is no such directory.
    """
    try:
        return shutil.disk_usage(directory).free
    except OSError as error:
        raise RunError(f"--disk {directory} cannot be used: {error.strerror}. Give a directory that exists.") from None
