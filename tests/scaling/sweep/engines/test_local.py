"""The pool of this machine: how it is divided, and what it does with processes that something else kills."""

import os
import subprocess
from pathlib import Path

import pytest

from cramjax.errors import ConfigError
from cramjax.scaling.sweep.engines import local
from cramjax.scaling.sweep.engines.local import Slot
from cramjax.scaling.sweep.trial import claimed_cores, error_file


def test_cores_are_shared_equally(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local, "_gpus", list)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert local.slots(None, 25) == [Slot(None, 1)] * 6
    assert local.slots(None, 2) == [Slot(None, 3)] * 2
    assert local.slots(4, 25) == [Slot(None, 1)] * 4  # equal, as sums depend on the number of threads
    assert local.slots(9, 25) == [Slot(None, 1)] * 9


def test_each_gpu_is_one_trials(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local, "_gpus", lambda: ["0", "3"])
    assert local.slots(None, 25) == [Slot("0", None), Slot("3", None)]
    assert local.slots(1, 25) == [Slot("0", None)]
    with pytest.raises(ConfigError, match="--jobs is 3, but a trial has a GPU to itself and there are 2"):
        local.slots(3, 25)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinities")
def test_claimed_cores_are_given_back_and_always_as_many():
    before = os.sched_getaffinity(0)
    with claimed_cores(1):
        (first,) = os.sched_getaffinity(0)
        assert first in before
        os.sched_setaffinity(0, before)
        with claimed_cores(1):  # all may be taken by others: then it shares one
            (second,) = os.sched_getaffinity(0)
            assert second != first or len(before) <= 2
        os.sched_setaffinity(0, {first})
    assert os.sched_getaffinity(0) == before


def test_a_trial_that_is_killed_each_time_fails_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "trials").mkdir()
    started: list[str] = []

    def start(name: str, out: Path, slot: Slot) -> "subprocess.Popen[bytes]":
        started.append(name)
        summary = out / "runs" / name / "summary.json"
        program = "kill -9 $$" if name == "bad" else f"mkdir -p {summary.parent} && touch {summary}"
        return subprocess.Popen(["sh", "-c", program])

    monkeypatch.setattr(local, "_start", start)
    monkeypatch.setattr(local, "_PAUSE", 0.01)
    ended = list(local.run(["bad", "good"], tmp_path, [Slot(None, 1)], lambda: False, lambda running: None))
    assert sorted(ended) == ["bad", "good"]
    assert started.count("bad") == 3 and started.count("good") == 1
    assert "was killed by SIGKILL, 3 times. It may have run out of memory" in error_file(tmp_path, "bad").read_text(
        encoding="utf-8"
    )
    assert not error_file(tmp_path, "good").exists()


def test_a_stop_starts_nothing_more(tmp_path: Path):
    assert list(local.run(["a"], tmp_path, [Slot(None, 1)], lambda: True, lambda running: None)) == []
