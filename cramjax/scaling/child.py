"""What the processes share that run one budget for a comparison or a sweep; and the process of a comparison:

    python -m cramjax.scaling.child CONFIG OUT PARENT

It trains, or continues what OUT holds, and leaves `summary.json` there. When the parent process goes, however it goes,
the run saves itself and ends.
"""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from filelock import FileLock

from cramjax.errors import RunInterruptedError, UserError
from cramjax.recipes import from_yaml


def train_or_resume(config: Path, out: Path) -> None:
    """Spend a budget, or what is left of it.

    Args:
        config: the run's configuration, a YAML file.
        out: the run directory, new or interrupted.

    Raises:
        RunInterruptedError: a signal arrived; the run has saved itself.
        UserError: anything that `cramjax.training.loop.train` refuses.
    """
    from cramjax.planning import fit
    from cramjax.training import resume, train

    if (out / "config.yaml").exists():
        resume(out)
        return
    shutil.rmtree(out, ignore_errors=True)  # of a process that was killed before it wrote anything that counts
    train(fit(from_yaml(config.read_text(encoding="utf-8"), str(config)), lambda sentence: None), out)


def run_lock(out: Path) -> FileLock:
    """Held by the process of a comparison that writes a run directory, even if its parent has gone already.

    Args:
        out: the run directory.
    """
    return FileLock(out.parent / f".{out.name}.lock")


def leave_with(parent: int) -> None:
    """Ask this process to save and leave, once, when the one that started it is gone.

    Args:
        parent: its process number.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(config: Path, out: Path, parent: int) -> int:
    """Run one side of a pair.

    Returns:
        The exit code: 0; 2 after an error that has been printed; 128 + the signal's number after an interruption.
    """
    leave_with(parent)
    try:
        with run_lock(out):
            train_or_resume(config, out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunInterruptedError as interruption:
        return 128 + interruption.signal_number
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
