"""Slurm: one array job, a task for each trial; its script is written through submitit, and submitted where Slurm is.

The sweep does not wait for the job: the same command, later, collects the table and submits what is still missing.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cramjax.cache import write_atomically
from cramjax.errors import ConfigError, RunError
from cramjax.scaling.sweep.engines import RunEngine

SCRIPT = "sweep.sbatch"
_MINUTES = 24 * 60
_SIGNAL_SECONDS = 90


def prepared(out: Path, *, jobs: int | None, cpus: int | None, gpus: float | None) -> RunEngine:
    """An engine that writes, and where it can submits, an array job.

    Args:
        out: the sweep's directory, which all nodes must see.
        jobs: most tasks at the same time.
        cpus: cores of each task; None: 1.
        gpus: GPUs of each task; None: none.

    Raises:
        ConfigError: submitit is not installed, or a number cannot be.
    """
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ConfigError('--engine slurm needs submitit: pip install "cramjax[sweep]".') from None
    if gpus is not None and (gpus < 0 or gpus % 1):
        raise ConfigError(f"--gpus must be a whole number with --engine slurm, got {gpus:g}.")

    def run(names: Sequence[str], stopping: Callable[[], bool], tick: Callable[[Sequence[str]], None]) -> Iterator[str]:
        submit(names, out.resolve(), jobs=jobs, cpus=cpus or 1, gpus=int(gpus or 0))
        yield from ()

    return run


def submit(names: Sequence[str], out: Path, *, jobs: int | None, cpus: int, gpus: int) -> None:
    """Write the array job's script, and submit it unless an earlier one is still in the queue.

    Raises:
        RunError: Slurm is not here, or refuses the job; the message says how to submit the script by hand.
    """
    job = out / "slurm" / "job"
    number = job.read_text(encoding="utf-8").strip() if job.exists() else ""
    if number and _in_queue(number):
        raise RunError(
            f"job {number} of this sweep is still in the queue; {out} has what is done so far. Run "
            "the same command again when it has ended, or cancel it first."
        )
    script = write_script(names, out, jobs=jobs, cpus=cpus, gpus=gpus)
    if shutil.which("sbatch") is None:
        raise RunError(
            f"there is no sbatch on this machine; the array job is written: submit it where Slurm is with `sbatch "
            f"{script}`, then run the same command again to collect the table."
        )
    answer = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if answer.returncode:
        raise RunError(f"sbatch refused {script}: {' '.join(answer.stderr.split())} Mend the script, or its options.")
    write_atomically(job, answer.stdout.strip().partition(";")[0] + "\n")


def write_script(names: Sequence[str], out: Path, *, jobs: int | None, cpus: int, gpus: int) -> Path:
    """Write an array job that runs trial i of `slurm/names` as its task i.

    A task told to leave saves its run first: when preempted it is queued again; near its time limit it ends, and the
    sweep's next call submits it anew.

    Args:
        names: of the trials.
        out: the sweep's directory, absolute.
        jobs: most tasks at the same time; None: all.
        cpus: cores of each task.
        gpus: GPUs of each task.

    Returns:
        The script.
    """
    from submitit.slurm.slurm import _make_sbatch_string  # what its executor writes; that itself only runs on Slurm

    folder = out / "slurm"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "names", "".join(f"{name}\n" for name in names))
    text = _make_sbatch_string(
        command=shlex.join([sys.executable, "-m", "cramjax.scaling.sweep.trial", str(out)]) + ' "$CRAMJAX_TRIAL"',
        folder=folder,
        job_name="cramjax-sweep",
        time=_MINUTES,
        ntasks_per_node=1,
        cpus_per_task=cpus,
        gpus_per_node=gpus or None,
        setup=[f'CRAMJAX_TRIAL=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(folder / "names"))})'],
        array_parallelism=jobs or len(names),
        map_count=len(names),
        additional_parameters={"signal": f"TERM@{_SIGNAL_SECONDS}", "requeue": True},
    )
    script = folder / SCRIPT
    write_atomically(script, text)
    return script


def _in_queue(job: str) -> bool:
    if shutil.which("squeue") is None or not re.fullmatch(r"\d+", job):
        return False
    answer = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True)
    return answer.returncode == 0 and bool(answer.stdout.strip())
