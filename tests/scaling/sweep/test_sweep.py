"""Sweeps on this machine: one table, whatever was stopped, killed or failed on the way."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import cramjax
from cramjax import cli
from cramjax.errors import ConfigError
from cramjax.scaling import read_runs
from cramjax.scaling.sweep.run import run_sweep
from tests.scaling.sweep.sweeps import mark_checkpointed, table


def started(file: Path, out: Path, *words: str) -> "subprocess.Popen[str]":
    """The sweep, as a command in a process of its own."""
    command = [sys.executable, "-m", "cramjax.cli", "sweep", str(file), "--out", str(out), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(process: "subprocess.Popen[str]") -> list[int]:
    """Its trials' processes."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in listed.read_text(encoding="utf-8").split()] if listed.exists() else []


def wait_for_some_progress(process: "subprocess.Popen[str]", out: Path, lines: int) -> None:
    """Wait until its trials have together logged so many more lines than before it ran them, or it has ended."""

    def logged() -> int:
        return sum(path.read_bytes().count(b'"train"') for path in out.glob("runs/*/metrics.jsonl"))

    while process.poll() is None and not children(process):
        time.sleep(0.01)
    before = logged()
    while process.poll() is None and logged() < before + lines:
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds a process's children in /proc, as on Linux")
def test_stopped_and_killed_at_random_a_sweep_resumes_to_the_same_table(tiny_sweep: Path, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with started(tiny_sweep, whole, "--jobs", "2") as process:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        assert out.strip() == str(whole / "runs.parquet")
    assert [row["status"] for row in table(whole)] == ["done"] * 3
    draw, orphans = random.Random(), []
    marked: set[Path] = set()
    for kill in ("kill", "stop"):
        with started(tiny_sweep, killed, "--jobs", "2") as process:
            wait_for_some_progress(process, killed, draw.randint(10, 50))
            assert process.poll() is None
            marked |= mark_checkpointed(killed)
            if kill == "kill":  # a run, and then the sweep with another one in progress
                victims = children(process)
                assert victims
                os.kill(draw.choice(victims), signal.SIGKILL)
                wait_for_some_progress(process, killed, draw.randint(1, 4))
                orphans = children(process)
                process.kill()
            else:
                process.send_signal(signal.SIGTERM)
                errors = process.communicate()[1]
                assert process.returncode == 128 + signal.SIGTERM, errors
                assert "trials done" in errors and "Run the same command again" in errors
                assert len(table(killed)) == 3  # saved, whatever there is
    with started(tiny_sweep, killed, "--jobs", "2") as process:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    assert table(killed) == table(whole)
    assert marked and all(mark.exists() for mark in marked)  # continued, not begun again
    assert not any(Path(f"/proc/{pid}/cmdline").exists() and _is_trial(pid) for pid in orphans)


def _is_trial(pid: int) -> bool:
    return b"cramjax.scaling.sweep.trial" in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.slow
def test_a_failed_trial_is_recorded_and_a_rerun_does_only_what_is_missing(
    corpus: Path, tiny_sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    content = yaml.safe_load(tiny_sweep.read_text(encoding="utf-8"))
    text = tmp_path / "there-later.txt"
    content["set"]["budget"] = "6steps"
    del content["set"]["data.source"]
    content["axes"] = {"grid": {"data.source": [str(corpus / "*.txt"), str(text)]}}
    tiny_sweep.write_text(yaml.safe_dump(content), encoding="utf-8")
    out = tmp_path / "out"
    assert cli.main(["sweep", str(tiny_sweep), "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert "1 of 2 trials failed" in printed.err and "there-later.txt" in printed.err
    good, bad = table(out)
    assert good["status"] == "done" and good["error"] is None and good["steps"] == 6
    assert bad["status"] == "failed" and "there-later.txt" in bad["error"] and bad["loss"] is None
    runs = read_runs(out / "runs.parquet")
    assert len(runs) == 1 and runs.dropped == 1

    summary = json.loads((out / "runs" / good["name"] / "summary.json").read_text(encoding="utf-8"))
    assert good["loss"] == summary["loss"] and good["params"] == summary["params"]
    config = yaml.safe_load(good["config"])
    assert good["model.width"] == config["model"]["width"] == 32
    log = (out / "runs" / good["name"] / "metrics.jsonl").read_text(encoding="utf-8")
    half = next(r for r in map(json.loads, log.splitlines()) if r["kind"] == "evaluate" and r["fraction"] >= 0.5)
    assert good["loss_at_50"] == half["loss"] and good["bits_per_byte_at_50"] == half["bits_per_byte"]

    text.write_bytes(b"".join(path.read_bytes() for path in sorted(corpus.glob("*.txt"))[:20]))
    before = (out / "runs" / good["name"] / "summary.json").stat().st_mtime_ns
    result = cramjax.sweep(tiny_sweep, out, quiet=True)
    assert result.counts == {"done": 2} and "2 done" in repr(result)
    assert (out / "runs" / good["name"] / "summary.json").stat().st_mtime_ns == before


def test_another_sweep_in_the_same_directory_is_refused(
    tiny_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cramjax.scaling.sweep.engines.local.run", lambda *given: iter(()))
    out = tmp_path / "out"
    assert run_sweep(tiny_sweep, out).counts == {"waiting": 3}
    assert run_sweep(tiny_sweep, out).counts == {"waiting": 3}
    with pytest.raises(ConfigError, match=r"1e10flop_12\.3k with another configuration \(seed was 0, now 7\)"):
        run_sweep(tiny_sweep, out, overrides={"seed": 7})
    with pytest.raises(ConfigError, match=r"another configuration \(evaluate\.points was 4, now 40\)"):
        run_sweep(tiny_sweep, out, overrides={"evaluate.points": 40, "checkpoint.points": 4})  # the lines are the same


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-sweep"], "there is no sweep 'no-such-sweep'. Sweeps: isoflop-mini"),
        (["quickstart"], "quickstart is a recipe"),
        (["isoflop-mini", "--set", "modle.width=3"], "unknown option --modle.width; did you mean --model.width?"),
        (["isoflop-mini", "--jobs", "0"], "--jobs must be 1 or more, got 0"),
        (["isoflop-mini", "--address", "auto"], "--address is of a Ray cluster, and the engine is local"),
        (["isoflop-mini", "--cpus", "2"], "--cpus and --gpus are for the engines ray and slurm"),
        (["isoflop-mini", "--engine", "cloud"], "invalid choice: 'cloud'"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_the_trials_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", "isoflop-mini", "--dry_run", "--set", "batch.size=16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 20 and all("batch 16" in line for line in lines)
    assert list(tmp_path.iterdir()) == []
