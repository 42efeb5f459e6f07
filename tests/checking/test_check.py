"""The whole check: what it returns, prints and writes, and its exit codes."""

import dataclasses
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from rich.console import Console

import cramjax
from cramjax import cli
from cramjax.checking import cases, machine
from cramjax.checking.cases import Case
from cramjax.checking.check import Check, check
from cramjax.checking.kernels import Limit, Row
from cramjax.checking.machine import Ceiling, Machine
from cramjax.checking.step import Step

_MACHINE = Machine("NVIDIA H100 80GB HBM3", "gpu", "9.0", 1, 75 << 30, 79 << 30, 16, 128 << 30, {"jax": "0.11.2"})
_STEP = Step("gpt-mini", 3_600_000, 4096, "bfloat16", 1.0, 30.0, 1e-3, 0.02, (9.0, 2.0))
_ROW = Row("attention", "causal", "bfloat16", "cudnn", (16, 1024, 12, 64), Limit(6e-3, "in bfloat16"))
_ROWS = [
    dataclasses.replace(_ROW, errors={"output": 2e-3, "dq": 2.5e-3}, seconds=4e-4, chosen=True),
    dataclasses.replace(_ROW, implementation="pallas", errors={"output": 2e-3, "dq": 2e-3}, seconds=6e-4),
    dataclasses.replace(_ROW, implementation="xla", refusal="it is Monday"),
]
_CHECK = Check(_MACHINE, [Ceiling("memory", "B/s", 3e12, 3.35e12)], _ROWS, _STEP, 200.0)


def _with(row: Row) -> Check:
    return dataclasses.replace(_CHECK, rows=[*_ROWS, row])


def test_a_check_that_is_right_says_so_last() -> None:
    assert _CHECK.wrong == []
    assert [_CHECK.ratio(row) for row in _ROWS] == [1.0, pytest.approx(1.5), None]
    lines = str(_CHECK).splitlines()
    assert lines[-1] == "All 2 results are right. It took 200 s."
    assert any("memory" in line and "3,000 GB/s" in line and "3,350 GB/s" in line and "90%" in line for line in lines)
    assert any("pallas" in line and "2.0e-03" in line and "1.50" in line for line in lines)
    assert "attention: not xla: it is Monday" in lines
    assert "Errors of up to 6.0e-03 are right in bfloat16." in lines
    assert "compiled in 30.0 s; 1 ms, 4.10M tokens/s, 2.0% of the peak; loss 9.00 → 2.00" in " ".join(lines)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"errors": {"output": 1e-3, "dq": 7e-3}}, "7.0e-03"),
        ({"errors": {"output": float("nan"), "dq": 1e-3}}, "nan"),
        ({"failure": "JaxRuntimeError: no valid engine"}, "mosaic failed: JaxRuntimeError: no valid engine"),
    ],
)
def test_a_check_that_is_wrong_names_it_last_and_in_json(changes: dict[str, Any], line: str) -> None:
    made = _with(dataclasses.replace(_ROW, implementation="mosaic", **changes))
    assert made.wrong == ["attention causal bfloat16 mosaic"]
    lines = str(made).splitlines()
    assert lines[-1].startswith("WRONG: attention causal bfloat16 mosaic. ")
    assert any(line in found for found in lines)
    written = json.loads(json.dumps(made.json(), allow_nan=False))
    assert written["passed"] is False and written["wrong"] == made.wrong
    assert written["kernels"][-1]["wrong"] is True and written["kernels"][0]["wrong"] is False


def test_a_check_is_readable_in_a_narrow_terminal() -> None:
    console = Console(width=50, color_system=None)
    with console.capture() as captured:
        console.print(_CHECK)
    shown = captured.get().replace("\xa0", " ")
    assert all(len(line.rstrip()) <= 50 for line in shown.splitlines()) and "…" not in shown
    for row in _CHECK.rows:
        if row.refusal is None:
            assert f"by {row.implementation}, " in shown and (row.error is None or f"error {row.error:.1e}" in shown)


def test_a_step_that_does_not_learn_is_wrong() -> None:
    for losses in ((9.0, 9.5), (9.0, float("nan"))):
        made = dataclasses.replace(_CHECK, step=dataclasses.replace(_STEP, losses=losses))
        assert made.wrong == ["step of gpt-mini"]


def test_it_refuses_a_kernel_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--kernels", "attention,flash"]) == 2
    wanted = "There is no kernel 'flash' to check: choose from attention, cross-entropy, softmax, adaptive-softmax,"
    assert wanted in capsys.readouterr().err
    assert cli.main(["check", "--json", "no/such/place.json"]) == 2
    assert "cannot write no/such/place.json" in capsys.readouterr().err


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of one kernel with an implementation that is wrong, and a step that is made up."""

    def twice(implementation: str, x: Any) -> Any:
        return (2.1 if implementation == "broken" else 2.0) * x

    def some(sizes: cases.Sizes, *implementations: str) -> list[Case]:
        return [Case("twice", twice, lambda x: 2.0 * x, {"x": (4, sizes.width)}, implementations=implementations)]

    table = {"right": lambda sizes: some(sizes, "plain"), "wrong": lambda sizes: some(sizes, "plain", "broken")}
    module = import_module("cramjax.checking.check")
    monkeypatch.setattr(module, "KERNELS", table)
    monkeypatch.setattr(module, "small_step", lambda: _STEP)


@pytest.mark.usefixtures("small")
def test_the_exit_code_is_1_if_a_number_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "check.json"
    assert cli.main(["check", "--quick", "--json", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("WRONG: wrong twice ") and "running kernels …" in captured.err
    written = json.loads(out.read_text(encoding="utf-8"))
    assert not written["passed"] and len(written["wrong"]) == 1 and written["wrong"][0].endswith("broken")
    assert [row["error"] for row in written["kernels"]] == [0, 0, pytest.approx(0.05, rel=0.1)]
    assert cli.main(["check", "--quick", "--kernels", "right", "--json", str(out)]) == 0
    assert "2 results" not in capsys.readouterr().out and json.loads(out.read_text(encoding="utf-8"))["passed"]


@pytest.mark.usefixtures("small")
def test_it_is_a_function_too(capsys: pytest.CaptureFixture[str]) -> None:
    made = cramjax.check(quick=True, kernels=["right"], quiet=True)
    assert (
        not made.wrong
        and "All 1 results are right" in repr(made)
        and "<caption>Ceilings</caption>" in made._repr_html_()
    )
    assert capsys.readouterr().err == ""


def test_ceilings_are_speeds_of_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    # A call that takes a tenth of a second: 2 n³ operations, or an array read and another written.
    monkeypatch.setattr(machine, "_seconds", lambda call: 0.1 if jnp.asarray(call()).size else 0.0)
    assert machine.product_flops("float32", 10) == pytest.approx(2 * 10**3 / 0.1)
    assert machine.copy_bandwidth(4000) == pytest.approx(2 * 4000 / 0.1)
    assert machine.bus_bandwidths(4000) == pytest.approx((4000 / 0.1, 4000 / 0.1))


@pytest.mark.slow
def test_a_quick_check_of_this_cpu_passes() -> None:
    heard: list[str] = []
    made = check(quick=True, kernels=["dense", "norm"], tell=lambda what, done, total: heard.append(what))
    assert made.wrong == []
    assert made.machine.platform == "cpu" and made.machine.versions["jax"]
    assert {ceiling.name for ceiling in made.ceilings} == {"bfloat16 products", "float32 products", "memory"}
    assert all(ceiling.measured > 0 and ceiling.sheet is None for ceiling in made.ceilings)
    assert {(row.kernel, row.implementation) for row in made.rows if row.chosen} == {("dense", "xla"), ("norm", "xla")}
    assert all(row.chosen == (row.refusal is None) for row in made.rows)
    assert made.step.compile_seconds > 0 and made.step.parameters == pytest.approx(3.6e6, rel=0.01)
    assert list(dict.fromkeys(heard))[-1] == "compiling and timing a small step"
