"""The cache directory of prepared data, compiled programs and measured peaks; and how a small file is written whole."""

import os
from pathlib import Path


def cache_directory(configured: str | None = None) -> Path:
    """The cache directory: as configured, else `$CRAMJAX_CACHE`, else `~/.cache/cramjax`; it is made if need be."""
    path = Path(configured or os.environ.get("CRAMJAX_CACHE") or "~/.cache/cramjax").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part, whenever the writer dies."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
