"""Checkpoints are whole, verified, and survive what happens to disks."""

import contextlib
import errno
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import RunError
from cramjax.training import checkpoint
from cramjax.training.checkpoint import (
    CheckpointWriter,
    Meta,
    best_intact,
    find_damage,
    list_checkpoints,
    newest_intact,
)

STATE = {"a": jnp.arange(12.0).reshape(3, 4), "b": (jnp.zeros((), jnp.int32), {"c": jnp.ones(5, jnp.bfloat16)})}


def meta(step: int, score: float | None = None) -> Meta:
    return Meta(
        step=step,
        position=8 * step,
        spent={"seconds": 1.0},
        config="c",
        tokenizer="t",
        final_fraction=0.5,
        data="d",
        bits_per_byte=score,
    )


@pytest.fixture
def writer(tmp_path: Path) -> CheckpointWriter:
    return CheckpointWriter(tmp_path, keep=2)


def save(writer: CheckpointWriter, step: int, score: float | None = None) -> None:
    writer.save(jax.tree.map(lambda x: x + step, STATE), meta(step, score))
    writer.wait()


def test_round_trip_is_exact(writer: CheckpointWriter) -> None:
    save(writer, 3)
    path = list_checkpoints(writer.directory)[0]
    restored = checkpoint.restore(path, STATE)
    assert jax.tree.structure(restored) == jax.tree.structure(STATE)
    for got, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(STATE), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted + 3))
    assert checkpoint.read_meta(path) == meta(3)


def test_saving_does_not_see_later_changes_of_the_buffers(writer: CheckpointWriter) -> None:
    state = jnp.zeros(1 << 20)
    writer.save({"x": state}, meta(1))
    state = jax.jit(lambda x: x + 1, donate_argnums=0)(state)
    state.block_until_ready()
    writer.wait()
    restored = checkpoint.restore(list_checkpoints(writer.directory)[0], {"x": state})
    assert float(jnp.max(jnp.abs(restored["x"]))) == 0.0


def test_keeps_the_newest_and_the_best(writer: CheckpointWriter) -> None:
    for step, score in enumerate([2.0, 1.0, 3.0, None, 2.5]):
        save(writer, step, score)
    assert [path.name for path in list_checkpoints(writer.directory)] == [f"step_{i:08d}" for i in (1, 3, 4)]
    best = best_intact(writer.directory, pytest.fail)
    assert best is not None and best.name == "step_00000001"


def test_a_score_may_follow_its_checkpoint(writer: CheckpointWriter) -> None:
    for step, score in enumerate([2.0, 1.0, 3.0, 4.0, 5.0]):
        writer.save(STATE, meta(step))
        writer.score(step, score)  # while it is being written
    writer.wait()
    paths = list_checkpoints(writer.directory)
    assert [checkpoint.read_meta(path).bits_per_byte for path in paths] == [1.0, 4.0, 5.0]
    assert [find_damage(path) for path in paths] == [None] * 3
    best = best_intact(writer.directory, pytest.fail)
    assert best is not None and best.name == "step_00000001"


def test_the_score_of_a_checkpoint_that_could_not_be_saved(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_checksums", lambda path: 1 / 0)
    writer.save(STATE, meta(1))
    writer.score(1, 2.0)
    with pytest.raises(RunError, match="could not be saved.*ZeroDivisionError"):
        writer.wait()


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "checksums"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(writer: CheckpointWriter, harm: str) -> None:
    save(writer, 1)
    save(writer, 2)
    newest = list_checkpoints(writer.directory)[-1]
    victim = max((p for p in (newest / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif harm == "truncate":
        victim.write_bytes(content[:-1])
    elif harm == "remove":
        victim.unlink()
    else:
        (newest / "checksums.json").unlink()
    messages: list[str] = []
    found = newest_intact(writer.directory, messages.append)
    assert found is not None and found.name == "step_00000001"
    assert len(messages) == 1 and "step_00000002" in messages[0] and messages[0].endswith("using the one before it.")
    (found / "checksums.json").unlink()
    assert newest_intact(writer.directory, messages.append) is None
    assert "step_00000001" in messages[-1] and messages[-1].endswith("there is none before it.")


def test_a_full_disk_leaves_the_last_checkpoint_intact(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(writer, 1)

    def full(path: Path) -> dict[str, str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_checksums", full)
    with pytest.raises(RunError, match=r"no space left.*step_00000001"):
        save(writer, 2)
    monkeypatch.undo()
    assert [p.name for p in writer.directory.iterdir()] == ["step_00000001"]
    assert find_damage(list_checkpoints(writer.directory)[0]) is None


def test_what_a_failed_save_goes_on_writing_is_removed_too(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[threading.Thread] = []

    def full(path: Path) -> dict[str, str]:
        def write() -> None:
            for number in range(20):
                path.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # removed since
                    (path / str(number)).touch()
                time.sleep(0.01)

        late.append(threading.Thread(target=write))
        late[0].start()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_checksums", full)
    with pytest.raises(RunError, match="no space left"):
        save(writer, 1)
    late[0].join()
    assert list(writer.directory.iterdir()) == []


def test_a_save_cut_off_by_a_kill_is_not_a_checkpoint(writer: CheckpointWriter) -> None:
    save(writer, 1)
    path = list_checkpoints(writer.directory)[0]
    path.rename(writer.directory / ".step_00000002.tmp")
    assert newest_intact(writer.directory, pytest.fail) is None


def test_arrays_of_another_configuration_are_refused(writer: CheckpointWriter) -> None:
    save(writer, 1)
    other = {**STATE, "a": jnp.zeros((3, 5))}
    with pytest.raises(RunError, match=r"a has shape \(3, 4\), this run needs \(3, 5\)"):
        checkpoint.restore(list_checkpoints(writer.directory)[0], other)


_FULL = """
import resource, signal, sys
from pathlib import Path
from cramjax.errors import RunError
from cramjax.start import start
from cramjax.training.checkpoint import CheckpointWriter, Meta
import jax
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
start()
writer = CheckpointWriter(Path(sys.argv[1]), keep=2)
arrays = {name: jax.random.normal(jax.random.key(0), (1 << 16,)) for name in "abcd"}
writer.save(arrays, Meta(1, 8, {}, "", "", 0.5, ""))
try:
    writer.wait()
except RunError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_told_once(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import cramjax" + _FULL, tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"a checkpoint could not be saved in {tmp_path}: ") and done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
