"""Lint, format, types and import contracts, so that `pytest` alone says whether a change is good."""

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent


def _run(*command: str) -> None:
    result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.fail(f"{' '.join(command)}\n{result.stdout}{result.stderr}", pytrace=False)


def test_ruff_finds_nothing():
    _run(sys.executable, "-m", "ruff", "check", "--no-cache", ".")


def test_formatted():
    _run(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", "--diff", ".")


def test_imports_go_one_way():
    _run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")


@pytest.mark.slow
def test_types():
    _run(sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable)


def test_files_stay_short():
    long = {
        str(path.relative_to(_ROOT)): lines
        for path in [*_ROOT.glob("cramjax/**/*.py"), *_ROOT.glob("tests/**/*.py")]
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long, "a file past 500 lines is two files"
