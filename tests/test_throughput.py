"""The benchmark of training speed ends when a contender does."""

import subprocess
import sys
from pathlib import Path

_BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_a_contender_that_dies_is_named() -> None:
    code = "import throughput as t; t.compare(t.SHAPES['nanogpt'], ['nobody'], 1, 0.1, 1)"
    result = subprocess.run([sys.executable, "-c", code], cwd=_BENCHMARKS, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "nobody died with exit code 1" in result.stderr
    assert "not enough values to unpack" in result.stderr  # its own message
