"""Sweeps on a Ray of this machine: a killed worker costs no run; what cannot be reached is said at once."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from cramjax import cli
from cramjax.errors import RunError
from cramjax.scaling.sweep.engines.ray import _connect, _trial
from tests.scaling.sweep.sweeps import mark_checkpointed, table

pytest.importorskip("ray")


def workers(process: psutil.Process) -> list[psutil.Process]:
    """Processes below it that work on a trial, by the name that Ray gives them."""
    found = []
    for child in process.children(recursive=True):
        try:
            if "ray::_trial" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


@pytest.mark.slow
def test_a_worker_killed_mid_run_costs_no_run(tiny_sweep: Path, tmp_path: Path):
    content = yaml.safe_load(tiny_sweep.read_text(encoding="utf-8"))
    content["axes"] = {"isoflop": {"budgets": ["15e9flop"], "sizes": [["12.3k", "28.7k"]]}}
    tiny_sweep.write_text(yaml.safe_dump(content), encoding="utf-8")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "cramjax.cli", "sweep", str(tiny_sweep), "--out"]
    subprocess.run([*command, str(whole), "--jobs", "2"], check=True, capture_output=True)
    ray = [*command, str(killed), "--engine", "ray"]
    with subprocess.Popen(ray, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (marked := mark_checkpointed(killed)):
            time.sleep(0.02)
        victims = workers(psutil.Process(process.pid))
        assert victims
        for victim in victims:
            os.kill(victim.pid, signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert [row["status"] for row in table(killed)] == ["done"] * 2
    assert marked and all(mark.exists() for mark in marked)  # continued elsewhere, not begun again
    local = os.cpu_count() == 2  # where both engines give a trial one core, the numbers are the same to the last bit
    for a, b in zip(table(killed), table(whole), strict=True):
        assert a["name"] == b["name"] and a["tokens"] == b["tokens"]
        assert a == b if local else a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_relative_paths_are_of_where_the_sweep_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker of a cluster starts wherever its machine's Ray was started."""
    seen: list[Path] = []
    monkeypatch.setattr("cramjax.scaling.sweep.engines.ray.run_trial", lambda out, name: seen.append(Path.cwd()))
    monkeypatch.chdir(tmp_path.parent)
    _trial("out", "name", os.cpu_count() or 1, str(tmp_path))
    _trial("out", "name", os.cpu_count() or 1, str(tmp_path / "not-there"))
    assert seen == [tmp_path, tmp_path]


@pytest.mark.parametrize("words", ["", "GCS said no.\n\nTraceback …"])
def test_what_ray_raises_as_it_connects_is_one_message(words: str, monkeypatch: pytest.MonkeyPatch):
    import ray

    def refuse(**options: object) -> None:
        raise ray.exceptions.RaySystemError(words)

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(RunError, match=r"cannot use a Ray at auto: \w[^.]*\. Start one") as refused:
        _connect("auto")
    assert "\n" not in str(refused.value) and "Traceback" not in str(refused.value)


def error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["sweep", "isoflop-mini", "--engine", "ray", *words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    return printed


def test_an_address_where_nothing_answers_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, but not listening
        for address in (f"127.0.0.1:{unused.getsockname()[1]}", f"ray://127.0.0.1:{unused.getsockname()[1]}"):
            started = time.monotonic()
            assert f"no Ray answers at {address}" in error(capsys, "--address", address)
            assert time.monotonic() - started < 60
    assert "must be HOST:PORT, ray://HOST:PORT or auto, got 'here'" in error(capsys, "--address", "here")
    assert "--cpus must be 1 or more, got 0" in error(capsys, "--cpus", "0")
    assert "--gpus must be from 0 to 1, or a whole number, with --engine ray, got 1.5" in error(capsys, "--gpus", "1.5")
    assert list(tmp_path.iterdir()) == []
