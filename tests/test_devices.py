"""What a CPU can do is measured for the cores that a process may use, and kept only if no other was in the way."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from cramjax import devices


@pytest.fixture
def peaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measures anew, in a cache of its own, with times that a test sets."""
    monkeypatch.setenv("CRAMJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(devices, "_fastest", functools.partial(_quick, devices._fastest))
    return devices._cpu_peaks.__wrapped__


def _quick(fastest: Any, work: float, compute: Any, repeats: int) -> Any:
    return fastest(work, functools.partial(jax.numpy.zeros, 1), repeats)


def test_what_others_disturbed_is_measured_again_and_not_kept(
    peaks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[bool] = []

    def in_the_way(own: float, others: float, there: float) -> bool:
        said.append(True)
        return True

    monkeypatch.setattr(devices, "_in_the_way", in_the_way)
    assert set(peaks()) == {"float32", "bfloat16", "bandwidth"}
    assert len(said) == 3 * 2 and not (tmp_path / "cpu_peaks.json").exists()
    monkeypatch.setattr(devices, "_in_the_way", lambda *_: False)
    measured = peaks()
    kept = json.loads((tmp_path / "cpu_peaks.json").read_text("utf-8"))
    assert list(kept.values()) == [measured] and peaks() == measured
    (tmp_path / "cpu_peaks.json").write_text("[1, 2", encoding="utf-8")
    assert set(peaks()) == set(measured)  # of a damaged file nothing is known


def test_peaks_are_those_of_the_cores_that_may_be_used(
    peaks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_in_the_way", lambda *_: False)
    for cores in (4, 1, 1.5):
        monkeypatch.setattr(devices, "usable_cores", lambda cores=cores: cores)
        peaks()
    names = json.loads((tmp_path / "cpu_peaks.json").read_text("utf-8"))
    assert [name.rsplit(", ", 1)[1] for name in names] == ["4 cores", "1 cores", "1.5 cores"]


@pytest.mark.parametrize(
    ("own", "others", "disturbed"),
    [(1.0, 1.0, True), (1.9, 0.1, False), (1.2, 0.0, False), (1.75, 0.25, True)],
    ids=["half", "all", "serial", "an eighth"],
)
def test_a_process_is_disturbed_if_others_had_its_cores(own: float, others: float, disturbed: bool) -> None:
    assert devices._in_the_way(own, others, 2.0) == disturbed


def test_quotas_of_control_groups(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")

    def quotas(own: str) -> list[float]:
        write("self", own)
        return list(devices._quotas(tmp_path / "fs", tmp_path / "self"))

    assert quotas("0::/\n") == []
    write("fs/slice/cpu.max", "150000 100000\n")
    write("fs/slice/inner/cpu.max", "max 100000\n")
    assert quotas("0::/slice/inner\n") == [1.5]
    write("fs/cpu/docker/cpu.cfs_quota_us", "-1\n")
    write("fs/cpu/docker/cpu.cfs_period_us", "100000\n")
    write("fs/cpu/cpu.cfs_quota_us", "200000\n")
    write("fs/cpu/cpu.cfs_period_us", "100000\n")
    assert quotas("3:memory:/x\n2:cpu,cpuacct:/docker\n1:name=systemd:/\n0::/\n") == [2.0]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinities here")
def test_a_process_knows_its_cores_and_how_busy_they_are() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [min(allowed)])
        assert devices.usable_cores() <= 1
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:  # on the same core
            began, before = time.monotonic(), devices._busy_seconds()
            time.sleep(0.5)
            busy, passed = devices._busy_seconds() - before, time.monotonic() - began
            other.kill()
        assert 0.6 * passed < busy < 1.4 * passed
    finally:
        os.sched_setaffinity(0, allowed)
