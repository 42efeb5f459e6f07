"""Slurm's array job without Slurm: its script, one task of it by hand, and stand-ins for sbatch and squeue."""

import os
import subprocess
from pathlib import Path

import pytest

from cramjax import cli
from cramjax.scaling.sweep.axes import read_sweep
from cramjax.scaling.sweep.trial import is_done

pytest.importorskip("submitit")


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def bin_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory before all others on the path, where there is no Slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


@pytest.mark.slow
def test_the_script_runs_a_trial_for_each_task(
    tiny_sweep: Path, tmp_path: Path, bin_only: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out with spaces"
    words = ["sweep", str(tiny_sweep), "--out", str(out), "--engine", "slurm", "--jobs", "2", "--cpus", "3"]
    assert cli.main(words) == 2
    script = out / "slurm" / "sweep.sbatch"
    error = capsys.readouterr().err
    assert f"`sbatch {script}`" in error and error.count("\n") == 1
    text = script.read_text(encoding="utf-8")
    for line in ("--array=0-2%2", "--cpus-per-task=3", "--requeue", "--signal=TERM@90"):
        assert f"#SBATCH {line}\n" in text

    program(
        bin_only / "srun", 'while [ "${1#-}" != "$1" ]; do [ "$1" = --unbuffered ] || shift; shift; done; exec "$@"'
    )
    names = [trial.name for trial in read_sweep(tiny_sweep)]
    subprocess.run(["sh", str(script)], env={**os.environ, "SLURM_ARRAY_TASK_ID": "1"}, check=True, cwd=tmp_path)
    assert [is_done(out, name) for name in names] == [False, True, False]

    # Where Slurm is, the same command submits what is missing, once.
    program(bin_only / "sbatch", 'echo "4711;cluster"')
    assert cli.main(words) == 0
    assert (out / "slurm" / "names").read_text(encoding="utf-8").split() == [names[0], names[2]]
    program(bin_only / "squeue", "echo 4711")
    capsys.readouterr()
    assert cli.main(words) == 2
    assert "job 4711 of this sweep is still in the queue" in capsys.readouterr().err
