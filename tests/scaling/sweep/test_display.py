"""The live table of a sweep: what it says of each state."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from cramjax.scaling.sweep.display import PlainDisplay, plain_line, render
from cramjax.scaling.sweep.results import progress


def row(name: str, status: str, **known: Any) -> dict[str, Any]:
    unscored = dict.fromkeys(("loss", "bits_per_byte", "accuracy"))
    empty = {"error": None, "params": 1_234_567, "tokens": None, **unscored, "seconds": None}
    return {"name": name, "status": status, **empty, **known}


ROWS = [
    row("a", "done", loss=3.25, bits_per_byte=1.5, seconds=90.0, tokens=2_000_000),
    row("b", "failed", error="no text"),
    row("c", "waiting"),
    row("d", "waiting"),
]


def test_the_table_shows_states_progress_and_counts(tmp_path: Path):
    run = tmp_path / "runs" / "c"
    run.mkdir(parents=True)
    train = {"kind": "train", "fraction": 0.2, "loss": 4.0}
    lines = [train, {"kind": "evaluate", "fraction": 0.25, "bits_per_byte": 2.0}]
    (run / "metrics.jsonl").write_text(
        "\n".join(json.dumps(line) for line in lines) + '\n{"kind": "tra', encoding="utf-8"
    )
    newest = progress(tmp_path, "c")
    assert newest["fraction"] == 0.25 and newest["loss"] == 4.0
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render(ROWS, {"c": newest}, height=10))
    shown = [line.split() for line in captured.get().splitlines()]
    assert ["a", "done", "1.23M", "100%", "3.250", "1.500", "1m30s"] in shown
    assert ["b", "failed", "1.23M"] in shown and ["d", "waiting", "1.23M"] in shown
    assert ["c", "running", "1.23M", "25%", "4.000", "2.000"] in shown
    assert "4 trials: 1 done 1 failed 1 running 1 waiting".split() in shown


def test_a_long_sweep_shows_what_runs(tmp_path: Path):
    rows = [row(f"t{i:03}", "done" if i < 50 else "waiting") for i in range(99)]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render(rows, {"t050": {}}, height=8))
    names = [line.split()[0] for line in captured.get().splitlines()[1:-1]]
    assert len(names) == 8 and "t050" in names


def test_a_trial_that_ends_is_a_line(capsys: Any):
    assert plain_line(ROWS[0]) == "a: 1.5000 bits per byte, 1.23M parameters, 2.00M tokens, 1m30s"
    assert plain_line(ROWS[1]) == "b: failed: no text"
    with PlainDisplay(Console(force_terminal=False)) as display:
        display.ended(ROWS[1])
    assert capsys.readouterr().out == "b: failed: no text\n"
