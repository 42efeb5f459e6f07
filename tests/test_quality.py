"""Lint, format, types and import contracts, so that `pytest` alone says whether a change is good."""

import ast
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


def test_text_is_read_and_written_as_utf_8():
    found = []
    for path in [*_ROOT.glob("cramjax/**/*.py"), *_ROOT.glob("tests/**/*.py"), *_ROOT.glob("benchmarks/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _is_text_of_no_encoding(node):
                found.append(f"{path.relative_to(_ROOT)}:{node.lineno}")
    assert not found, "give encoding='utf-8': the machine's own may be another"


def _is_text_of_no_encoding(call: ast.Call) -> bool:
    """Whether a call opens, reads or writes a text file without saying its encoding."""
    words = [word.value for word in [*call.args, *(k.value for k in call.keywords)] if isinstance(word, ast.Constant)]
    if {"utf-8", "utf-8-sig"} & {str(word) for word in words}:
        return False
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and not any(str(word).endswith("b") for word in words[-1:])
    if not isinstance(call.func, ast.Attribute):
        return False
    if call.func.attr == "open":
        return not any(str(word) in ("rb", "wb", "ab", "r+b") for word in words)
    return call.func.attr == "write_text" or (call.func.attr == "read_text" and not call.args)
