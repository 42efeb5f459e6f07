"""The benchmark on a card: a contender that fails is a row and the others go on; the quick run works on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra `parity`")

_BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

# Contenders that take a known time a step, on a clock of their own; or fail: before they are ready, in one of two
# modes, or in their turn.
_FAKES = """
import types
import gpu
from gpu import Prepared, prepare, serve

now = 0.0
gpu.time = types.SimpleNamespace(perf_counter=lambda: now)

def sleeper(seconds):
    def step(number):
        global now
        now += seconds
        return 2.5
    return step

def steady(pipe, config, modes):
    steps = {mode: sleeper(0.02 if mode == "slow" else 0.01) for mode in modes}
    serve(pipe, {m: prepare("CPU", "float32", step, 3.0, lambda: 7) for m, step in steps.items()}, steps)

def dies(pipe, config, modes):
    raise SystemExit(3)

def out_of_memory(pipe, config, modes):
    serve(pipe, {mode: Prepared(failure="OutOfMemoryError: 1 GiB") for mode in modes}, {})

def dies_later(pipe, config, modes):
    pipe.send({mode: Prepared("CPU", "float32", 0.0, 0.01) for mode in modes})
    pipe.recv()
    raise SystemExit(4)
"""
_RUN = """
import json, sys, gpu, fakes
if __name__ == "__main__":
    workers = {name: (getattr(fakes, worker), modes) for name, (worker, modes) in json.loads(sys.argv[1]).items()}
    config = gpu.config_of(gpu.SHAPES["gpt-124m"], quick=True)
    results = gpu.compare(config, workers, 2, 0.1)
    gpu.report(config, results)
    json.dump(results, open("results.json", "w", encoding="utf-8"))
"""


def _compare(directory: Path, **workers: Any) -> tuple[dict[str, Any], str]:
    (directory / "fakes.py").write_text(_FAKES, encoding="utf-8")
    (directory / "run.py").write_text(_RUN, encoding="utf-8")
    path = os.pathsep.join([str(directory), str(_BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "run.py", json.dumps(workers)]
    run = subprocess.run(
        command, cwd=directory, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return json.loads((directory / "results.json").read_text(encoding="utf-8")), run.stdout


def test_the_fastest_mode_takes_turns_and_ratios_are_of_times(tmp_path: Path) -> None:
    results, printed = _compare(tmp_path, PyTorch=("steady", ["slow", "fast"]), CramJAX=("steady", ["slow"]))
    assert set(results) == {"PyTorch slow", "PyTorch fast", "CramJAX slow"}
    assert [len(result["seconds"]) for result in results.values()] == [0, 2, 2]
    fast, ours = results["PyTorch fast"], results["CramJAX slow"]
    assert [fast["step_seconds"], ours["step_seconds"]] == pytest.approx([0.01, 0.02])
    assert ours["ratio"] == pytest.approx(0.5)
    assert ours["tokens_per_second"] == pytest.approx(4 * 32 / 0.02)  # of the quick shape
    assert ours["start_seconds"] == pytest.approx(3.0) and ours["memory_bytes"] == 7 and ours["mfu"] is None
    assert "PyTorch fast" in printed and "loss 2.50" in printed


def test_a_contender_that_fails_is_a_row_with_its_reason(tmp_path: Path) -> None:
    results, printed = _compare(
        tmp_path, PyTorch=("out_of_memory", ["eager"]), CramJAX=("steady", [""]), other=("dies", ["a", "b"])
    )
    assert results["PyTorch eager"]["failure"] == "OutOfMemoryError: 1 GiB"
    assert "died with exit code 3" in results["other a"]["failure"]
    ours = results["CramJAX"]
    assert ours["failure"] is None and len(ours["seconds"]) == 2 and ours["ratio"] is None
    assert "OutOfMemoryError: 1 GiB" in printed


def test_a_contender_that_dies_in_its_turn_ends_no_other(tmp_path: Path) -> None:
    results, _ = _compare(tmp_path, PyTorch=("dies_later", ["eager"]), CramJAX=("steady", [""]))
    assert "died with exit code 4" in results["PyTorch eager"]["failure"]
    assert len(results["CramJAX"]["seconds"]) == 2


@pytest.mark.slow
def test_the_quick_run_trains_in_both_libraries(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "gpu.py", "--quick", "--shapes", "crammed-bert", "--json", str(out)]
    run = subprocess.run(command, cwd=_BENCHMARKS, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    results = json.loads(out.read_text(encoding="utf-8"))["shapes"]["crammed-bert"]["results"]
    assert set(results) == {"PyTorch eager", "CramJAX"}
    assert all(result["failure"] is None and result["dtype"] == "float32" for result in results.values())
    # Both begin at a uniform guess among 512 tokens, 6.24 nats.
    assert all(5 < result["loss"] < 6.5 for result in results.values())
    assert results["CramJAX"]["ratio"] > 0
