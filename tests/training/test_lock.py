"""One process at a time trains in a run directory."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cramjax.cli import main
from cramjax.config import RunConfig
from cramjax.errors import RunError
from cramjax.recipes import to_yaml
from cramjax.training import resume, train
from cramjax.training.lock import locked

_HOLD = """
import sys
from pathlib import Path
from cramjax.training.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_process_is_told_who_holds_a_run(
    tiny: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = tmp_path / "run", tiny(budget="2steps")
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        said = rf"process {holder.pid} on {socket.gethostname()} has trained in it since 20\d\d-\d\d-\d\d "
        with pytest.raises(RunError, match=said):
            train(config, run)
        (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        with pytest.raises(RunError, match=said):
            resume(run)
        assert main(["train", "--resume", str(run)]) == 2
        assert re.match(rf"error: .*{said}", capsys.readouterr().err)
        holder.kill()  # and its lock is no obstacle, though its name is still there
    assert (run / ".lock.json").exists()
    assert resume(run).summary["steps"] == 2
    assert not (run / ".lock.json").exists()


def test_a_lock_leaves_no_directory_behind_in_which_nothing_was_written(tmp_path: Path) -> None:
    with locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with locked(tmp_path / "old"):
        assert os.listdir(tmp_path / "old")
    assert (tmp_path / "old").exists()


def test_a_holder_that_cannot_be_read_is_still_one(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / ".lock.json").write_bytes(b"\xff")
        with pytest.raises(RunError, match="another process trains in it"), locked(tmp_path):
            pass


def test_what_a_killed_process_had_begun_to_write_is_removed(tmp_path: Path) -> None:
    begun = tmp_path / "checkpoints" / ".step_00000002.tmp" / "state"
    begun.mkdir(parents=True)
    for file in (begun / "d", tmp_path / ".summary.json.123.tmp", tmp_path / "checkpoints" / "step_00000001"):
        file.write_text("x", encoding="utf-8")
    with locked(tmp_path):
        assert os.listdir(tmp_path / "checkpoints") == ["step_00000001"]
        assert sorted(os.listdir(tmp_path)) == [".lock", ".lock.json", "checkpoints"]
