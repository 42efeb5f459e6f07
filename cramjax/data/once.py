"""Prepares a directory of the cache once, whoever asks for it at the same time: it is whole or not there."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

Prepared = TypeVar("Prepared")
Progress = Callable[[str], None]
"""Called with a sentence that says what is being prepared and how far it is, every few seconds."""

PROGRESS_SECONDS = 2.0


def prepared_once(
    directory: Path, load: Callable[[Path], Prepared | None], write: Callable[[Path], None], progress: Progress
) -> Prepared:
    """What is in a directory of the cache, written first if it is not there.

    The directory appears by one rename, so an interrupted preparation leaves nothing that looks finished.

    Args:
        directory: where it is or will be.
        load: reads it; None where it is not there, not complete, or of another format.
        write: fills an empty directory.
        progress: is told when another process prepares the same.

    Raises:
        OSError: the cache cannot be written.
    """
    prepared = load(directory)
    if prepared is not None:
        return prepared
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_suffix(".lock"), progress):
        prepared = load(directory)  # Another process may have prepared it while this one waited.
        if prepared is not None:
            return prepared
        unfinished = directory.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.mkdir()
        try:
            write(unfinished)
            unfinished.rename(directory)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        prepared = load(directory)
    assert prepared is not None, f"{directory} was just written"
    return prepared


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("waiting for another process that prepares the same data")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
