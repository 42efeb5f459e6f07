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

from cramjax import cli
from tests.scaling.sweeps import mark_checkpointed, table

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
    assert [row["status"] for row in table(killed)] == ["done"] * 3
    assert marked and all(mark.exists() for mark in marked)  # continued elsewhere, not begun again
    local = os.cpu_count() == 2  # where both engines give a trial one core, the numbers are the same to the last bit
    for a, b in zip(table(killed), table(whole), strict=True):
        assert a["name"] == b["name"] and a["tokens"] == b["tokens"]
        assert a == b if local else a["loss"] == pytest.approx(b["loss"], rel=1e-3)


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
    assert list(tmp_path.iterdir()) == []
