"""The lock of a run directory: one process at a time trains in it, and says who it is."""

import contextlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Collection, Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from cramjax.cache import write_atomically
from cramjax.errors import RunError

_LOCK, _HOLDER = ".lock", ".lock.json"
# The holder's own file: one that is locked cannot be read everywhere.

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run directory, which is made if need be; the system lets go of it when the process dies.

    What a process that was killed had begun to write is removed.

    Raises:
        RunError: another process holds it.
    """
    made = [path for path in (run, *run.parents) if not path.exists()]
    run.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(run / _LOCK), run / _HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{run} is in use: {_who(holder)}. Wait for it, or end it first.") from None
    except NotImplementedError:
        _log.warning("the file system of %s has no locks: let only one process train there.", run)
    try:
        since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        for left in (*run.glob(".*.tmp"), *run.glob("checkpoints/.*.tmp")):  # by a process killed while it wrote
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_atomically(holder, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        if made and is_empty(run):  # nothing came of it
            (run / _LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another has put something there
                for path in made:
                    path.rmdir()
        lock.release()


def clear(run: Path, but: Collection[str] = ()) -> None:
    """Remove what a run directory holds, but for its lock and some names."""
    for path in run.iterdir():
        if path.name not in (_LOCK, _HOLDER, *but):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_empty(run: Path) -> bool:
    """Whether a directory holds nothing but what is left of a lock."""
    return all(path.name in (_LOCK, _HOLDER) for path in run.iterdir())


def _who(holder: Path) -> str:
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} has trained in it since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # this very moment, or damaged
        return "another process trains in it"
