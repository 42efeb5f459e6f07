"""The cache directory: bounded, and compiled programs are only found by the machine they were made for."""

import os
import subprocess
import sys
from pathlib import Path

import jaxlib.version
import pytest

from cramjax import devices
from cramjax.cache import prune


def _file(path: Path, size: int, read: float, written: float = 1000.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (read, written))
    return path


def test_what_was_longest_not_read_goes_first(tmp_path: Path) -> None:
    old = _file(tmp_path / "cpu-a" / "old-cache", 10, read=2000)
    tuned = _file(tmp_path / "cpu-b" / "tuned" / "x", 10, read=4000)
    unread = _file(tmp_path / "unread", 10, read=1000, written=3000)  # newer than it looks: times are not kept
    new = _file(tmp_path / "new", 10, read=5000)
    prune(tmp_path, 40)
    assert all(path.exists() for path in (old, unread, tuned, new))
    prune(tmp_path, 29)
    assert [path.exists() for path in (old, unread, tuned, new)] == [False, False, True, True]
    prune(tmp_path, 5)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    prune(tmp_path / "nowhere", 0)


def test_a_file_that_another_process_deleted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, here = tmp_path / "gone", _file(tmp_path / "here", 10, read=1000)
    monkeypatch.setattr(Path, "rglob", lambda *_: iter([gone, here]))
    prune(tmp_path, 0)
    assert not here.exists()


def test_a_file_that_may_not_be_deleted_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign, next_one, new = (_file(tmp_path / str(time), 10, read=time, written=0) for time in (1, 2, 3))
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path == foreign:
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    prune(tmp_path, 20)
    assert [path.exists() for path in (foreign, next_one, new)] == [True, False, True]


def test_a_cpu_is_told_by_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"model name": "CPU", "flags": "sse avx"}
    monkeypatch.setattr(devices, "_cpu_info", lambda name: info.get(name, ""))
    one = devices.cpu_fingerprint()
    assert one == devices.cpu_fingerprint()
    info["flags"] = "sse avx avx512_bf16"
    assert devices.cpu_fingerprint() != one


_COMPILE = """
import sys, jax, jax.numpy as jnp
from cramjax import compiling
compiling.CACHE_BYTES = int(sys.argv[1])
compiling.keep_programs()
compiling.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
print(jax.config.values["jax_compilation_cache_dir"])
"""


@pytest.mark.slow
def test_programs_are_kept_and_bounded(tmp_path: Path) -> None:
    environment = {n: v for n, v in os.environ.items() if n != "JAX_COMPILATION_CACHE_DIR"}

    def run(most: int) -> Path:
        words = [sys.executable, "-c", _COMPILE, str(most)]
        done = subprocess.run(
            words, capture_output=True, text=True, check=True, env=environment | {"CRAMJAX_CACHE": str(tmp_path)}
        )
        return Path(done.stdout.strip())

    foreign = _file(tmp_path / "xla" / "another-cpu" / "program-cache", 1000, read=1000)
    own = run(1 << 30)
    assert own.parent == tmp_path / "xla" and own.name.endswith(jaxlib.version.__version__)
    programs = set(own.glob("*-cache"))
    assert programs and foreign.exists()
    assert run(1 << 30) == own and set(own.glob("*-cache")) == programs  # found again, none made anew
    size = sum(path.stat().st_size for path in own.rglob("*") if path.is_file())
    run(size)
    assert not foreign.exists() and set(own.glob("*-cache")) == programs


@pytest.mark.slow
def test_a_cache_that_the_user_chose_is_left(tmp_path: Path) -> None:
    theirs = _file(tmp_path / "theirs" / "program-cache", 1000, read=1000)
    environment = {"CRAMJAX_CACHE": str(tmp_path / "ours"), "JAX_COMPILATION_CACHE_DIR": str(theirs.parent)}
    words = [sys.executable, "-c", _COMPILE, "0"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | environment)
    assert done.stdout.strip() == str(theirs.parent) and theirs.exists()
