"""The cache directory of prepared data, compiled programs and measured peaks; and how a small file is written whole."""

import contextlib
import os
import stat
from pathlib import Path


def cache_directory(configured: str | None = None) -> Path:
    """The cache directory: as configured, else `$CRAMJAX_CACHE`, else `~/.cache/cramjax`; it is made if need be."""
    path = Path(configured or os.environ.get("CRAMJAX_CACHE") or "~/.cache/cramjax").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part, whenever the writer dies."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def prune(directory: Path, most: int) -> None:
    """Delete the files below a directory that were longest not read, until the rest fits a size.

    A file system that does not keep times of reading has those of writing. Processes may prune and use a directory at
    once: a file that is gone is none, and one that may not be read or deleted stays.

    Args:
        directory: it need not exist.
        most: bytes.
    """
    files = []
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                files.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most:
            return
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            total -= size
