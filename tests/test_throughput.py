"""The benchmark of training speed ends when a contender does, and no slow product holds it up."""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

_BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_a_contender_that_dies_is_named() -> None:
    code = "import throughput as t; t.compare(t.SHAPES['nanogpt'], ['nobody'], 1, 0.1, 1)"
    result = subprocess.run([sys.executable, "-c", code], cwd=_BENCHMARKS, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "nobody died with exit code 1" in result.stderr
    assert "not enough values to unpack" in result.stderr  # its own message


def test_a_contender_that_does_not_answer_is_named() -> None:
    code = (
        "import throughput as t; t.START_SECONDS = 0.01; t.compare(t.SHAPES['nanogpt'], ['cramjax-float32'], 1, 0.1, 1)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=_BENCHMARKS, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "cramjax-float32 did not answer within 0.01 s: leave it out, with --variants." in result.stderr


@pytest.fixture
def throughput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("throughput", _BENCHMARKS / "throughput.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "throughput", module)
    spec.loader.exec_module(module)
    return module


def _machine(flops: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[int], Callable[[], None]], list[float]]:
    """Products on a machine of so many FLOP/s, on a clock of its own; and the seconds of each."""
    products: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: sum(products))
    return lambda size: lambda: products.append(2 * size**3 / flops), products


@pytest.mark.parametrize("flops", [1e7, 1e8, 1e9, 1e11, 1e13])
def test_a_peak_is_measured_in_about_the_time_given(
    flops: float, throughput: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    product_of, products = _machine(flops, monkeypatch)
    assert throughput.best_rate(product_of, seconds=1.0) == pytest.approx(flops)
    smallest = 2 * 128**3 / flops
    # Two of the smallest at least; else the time, two of the last products more, and the first of each size unmeasured.
    assert sum(products) <= max(2 * smallest, 2.5)
    assert flops < 1e11 or max(products) == pytest.approx(
        2 * 2048**3 / flops
    )  # a fast machine is measured on large ones
