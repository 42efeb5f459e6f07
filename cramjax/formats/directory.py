"""Directories and files that are written whole or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cramjax.errors import ModelError


@contextlib.contextmanager
def new_directory(out: str | Path) -> Iterator[Path]:
    """A directory under a hidden name, which is given its own when all went well and is removed when not.

    Args:
        out: what it will be; its parents are made.

    Raises:
        ModelError: it exists, or cannot be written.
    """
    with new_file(out) as path:
        path.mkdir()
        yield path


@contextlib.contextmanager
def new_file(out: str | Path) -> Iterator[Path]:
    """As `new_directory`, the path of a file that does not exist yet."""
    out = Path(out).expanduser()
    require_new(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        require_new(out)  # another may have made it meanwhile
        temporary.replace(out)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError):
            full = error.errno == errno.ENOSPC or "No space left" in str(error)
            reason = "no space is left on the device: free some" if full else f"{error.strerror or error}: mend that"
            raise ModelError(f"{out} cannot be written: {reason}, or give another path to --out.") from error
        raise


def require_new(out: str | Path) -> None:
    """Refuse an output that exists.

    Raises:
        ModelError: it does.
    """
    if os.path.lexists(Path(out).expanduser()):
        raise ModelError(f"{out} exists already: give another path to --out, or remove it.")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
