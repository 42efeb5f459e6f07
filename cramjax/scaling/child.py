"""One run of a comparison, in a process of its own: `python -m cramjax.scaling.child CONFIG OUT`.

It trains, or continues what OUT holds, and leaves `summary.json` there; samples, baselines and the report, which a
comparison does not read, are left out. When the parent process goes, however it goes, the run saves itself and ends.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from cramjax.errors import RunInterruptedError, UserError


def main(config_path: Path, out: Path) -> int:
    """Spend one budget.

    Args:
        config_path: the run's configuration, a YAML file.
        out: the run directory, new or interrupted.

    Returns:
        The exit code: 0; 2 after an error that has been printed; 128 + the signal's number after an interruption.
    """
    from cramjax.planning import fit
    from cramjax.recipes import from_yaml
    from cramjax.train import resume, train

    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        if (out / "config.yaml").exists():
            resume(out)
        else:
            train(fit(from_yaml(config_path.read_text(encoding="utf-8"), str(config_path)), lambda sentence: None), out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunInterruptedError as interruption:
        return 128 + interruption.signal_number
    return 0


def _leave_with_parent() -> None:
    os.read(0, 1)  # the other end of standard input closes when the parent ends
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
