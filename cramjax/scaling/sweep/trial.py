"""One trial of a sweep, in a process of its own: whatever its directory lacks is done, and then nothing is.

    python -m cramjax.scaling.sweep.trial OUT NAME [--cores N] [--parent PROCESS]

Every engine ends here. The sweep's directory holds `trials/NAME.yaml` (what to run), `trials/NAME.error` (why it
failed), and `runs/NAME/`, an ordinary run directory. A lock keeps two processes from the same trial, whoever started
them.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from cramjax.cache import write_atomically
from cramjax.errors import RunInterruptedError, UserError
from cramjax.scaling.child import leave_with, train_or_resume

FAILED = 3
"""Exit code of a trial that failed and has said why in its error file."""


def config_file(out: Path, name: str) -> Path:
    """Where a sweep keeps the configuration of a trial."""
    return out / "trials" / f"{name}.yaml"


def error_file(out: Path, name: str) -> Path:
    """Where a failed trial says why."""
    return out / "trials" / f"{name}.error"


def run_directory(out: Path, name: str) -> Path:
    """The run directory of a trial."""
    return out / "runs" / name


def is_done(out: Path, name: str) -> bool:
    """Whether a trial has spent its budget and scored its text."""
    return (run_directory(out, name) / "summary.json").exists()


def run_trial(out: Path, name: str) -> None:
    """Start a trial, continue it, or do nothing if it is done.

    Args:
        out: the sweep's directory.
        name: of the trial.

    Raises:
        RunInterruptedError: a signal arrived; the run has saved itself.
        Exception: it failed; the error file says why.
    """
    with FileLock(out / "trials" / f".{name}.lock"):
        if is_done(out, name):
            return
        error_file(out, name).unlink(missing_ok=True)
        try:
            train_or_resume(config_file(out, name), run_directory(out, name))
        except RunInterruptedError:
            raise
        except Exception as error:
            write_atomically(error_file(out, name), _describe(error))
            raise


def _describe(error: Exception) -> str:
    """A user's mistake as its sentence; anything else with its traceback below."""
    if isinstance(error, UserError):
        return f"{error}\n"
    return f"{type(error).__name__}: {error}\n\n{''.join(traceback.format_exception(error))}"


@contextlib.contextmanager
def claimed_cores(number: int | None) -> Iterator[None]:
    """Keep this process to so many cores that no other trial on this machine has claimed.

    XLA has as many threads as the process has cores when jax starts, so this comes before. Claims are locks on files,
    which the system drops when a process dies. Where the system has no affinities, or no cores are free, nothing is
    claimed.

    Args:
        number: cores to claim; None: leave all of them.
    """
    if number is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    folder = Path(tempfile.gettempdir()) / f"cramjax-cores-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    allowed = sorted(os.sched_getaffinity(0))
    claimed: dict[int, FileLock] = {}
    for core in allowed:
        lock = FileLock(folder / str(core))
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            claimed[core] = lock
        if len(claimed) == number:
            break
    others = [core for core in allowed if core not in claimed]
    # Always the same number, even if some are shared: how XLA divides sums depends on it.
    os.sched_setaffinity(0, [*claimed, *others[: max(0, number - len(claimed))]])
    try:
        yield
    finally:
        for lock in claimed.values():
            lock.release()
        os.sched_setaffinity(0, allowed)


def main(words: list[str] | None = None) -> int:
    """Run one trial; the exit code is 0, `FAILED`, or 128 + a signal's number."""
    parser = argparse.ArgumentParser(prog="python -m cramjax.scaling.sweep.trial")
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("--cores", type=int)
    parser.add_argument("--parent", type=int)
    given = parser.parse_args(words)
    name = given.name
    if given.parent is not None:
        leave_with(given.parent)
    try:
        with claimed_cores(given.cores):
            run_trial(given.out, name)
    except RunInterruptedError as interruption:
        return 128 + interruption.signal_number
    except Exception as error:
        print(_describe(error), file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
