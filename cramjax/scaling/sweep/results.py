"""The table of a sweep: one row for each trial, made from run directories alone, in one Parquet file.

It is written whole after every trial, and is what `cramjax fit` reads: a run that is not done has no loss there.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from cramjax.budget import Budget
from cramjax.config import RunConfig
from cramjax.recipes import to_yaml
from cramjax.scaling.sweep.axes import Trial
from cramjax.scaling.sweep.trial import error_file, run_directory
from cramjax.training.metrics import Record, read_records

Status = Literal["done", "failed", "stopped", "waiting"]
Row = dict[str, Any]

TABLE = "runs.parquet"
TIMES = ("seconds", "prepare_seconds", "tokens_per_second", "mfu", "memory_bytes")
"""Columns that differ from one execution of a run to the next; all others are the same for FLOP budgets."""
FRACTIONS = (0.25, 0.5, 0.75)
"""Of the budget, at which the columns `loss_at_25` and so on give the held-out loss."""


def row_of(trial: Trial, out: Path) -> Row:
    """What there is to say of a trial.

    `loss` (nats per token), `bits_per_byte` and `accuracy` are of all held-out text, at the end; on labels and
    preferences `loss` is per text or pair, and there are no bits per byte. At 25, 50 and 75% of the budget
    and in `curve`, they are of its first `evaluate.tokens` tokens; a quarter is empty unless `evaluate.points` is a
    multiple of 4 (or 2, for the half).

    Args:
        trial: its name and configuration.
        out: the sweep's directory.
    """
    from cramjax.scaling.shapes import parameters_of
    from cramjax.training.continuing import continued  # which reads models: jax

    path = run_directory(out, trial.name)
    summary = _read_json(path / "summary.json")
    error = _read_text(error_file(out, trial.name)).strip() if not summary else ""
    records = read_records(path)
    curve = [
        {
            name: None if r.get(name) is None else float(r[name])
            for name in ("fraction", "tokens", "flops", "loss", "bits_per_byte")
        }
        for r in records
        if r["kind"] == "evaluate" and r["fraction"] < 1.0
    ]
    status: Status = "done" if summary else "failed" if error else "stopped" if path.exists() else "waiting"
    counted = parameters_of(continued(trial.config))
    budget = Budget.parse(trial.config.budget)
    row: Row = {
        "name": trial.name,
        "status": status,
        "error": error.splitlines()[0] if error else None,
        "params": summary.get("params", counted.total),
        "params_non_embedding": counted.blocks,
        "tokens": _whole(summary.get("tokens")),
        "flops": summary.get("flops"),
        "steps": _whole(summary.get("steps")),
        "epochs": summary.get("epochs"),
        "loss": summary.get("loss"),
        "bits_per_byte": summary.get("bits_per_byte"),
        "accuracy": summary.get("accuracy"),
        "budget_amount": budget.amount,
        "budget_unit": budget.unit,
    }
    for fraction in FRACTIONS:
        at = _at(curve, fraction, trial.config.evaluate.points)
        row |= {f"{name}_at_{fraction:.0%}".rstrip("%"): at.get(name) for name in ("loss", "bits_per_byte")}
    row |= {
        "curve": curve,
        "seconds": summary.get("train_seconds"),
        "prepare_seconds": summary.get("prepare_seconds"),
        "tokens_per_second": summary.get("tokens_per_second"),
        "mfu": summary.get("mfu"),
        "memory_bytes": _whole(summary.get("memory_bytes")),
        "device": summary.get("device"),
        **dict(_cells(trial.config)),
        "config": to_yaml(trial.config),
    }
    return row


def write_table(rows: Sequence[Row], out: Path) -> Path:
    """Write the table, so that a reader sees the old one or the new.

    Args:
        rows: from `row_of`.
        out: the sweep's directory.

    Returns:
        The Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = out / TABLE
    temporary = out / f".{TABLE}.{os.getpid()}.tmp"
    curve = pa.list_(pa.struct([(n, pa.float64()) for n in ("fraction", "tokens", "flops", "loss", "bits_per_byte")]))
    types: dict[str, Any] = {"curve": curve, "error": pa.string(), "device": pa.string()}
    types |= {name: pa.int64() for name in ("tokens", "steps", "memory_bytes")}
    names = dict.fromkeys(name for row in rows for name in row)  # one trial may have a group that another has not
    types |= {
        name: pa.float64()
        for name in names
        if name not in types and name.startswith(("loss", "bits_per_byte", "accuracy", "flops", "epochs", *TIMES))
    }
    columns = {name: pa.array([row.get(name) for row in rows], types.get(name)) for name in names}
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(path)
    return path


def progress(out: Path, name: str) -> Record:
    """The newest of what a run says of itself: its `fraction`, `loss` and `bits_per_byte`, as far as it has them."""
    path = run_directory(out, name) / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    found: dict[str, Any] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # cut short at either end
            continue
        if isinstance(record, dict) and record.get("kind") in ("train", "evaluate"):
            found.update(record)
    return found


def _at(curve: Sequence[Mapping[str, Any]], fraction: float, points: int) -> Mapping[str, Any]:
    """The evaluation due at a fraction: that of the first step past it."""
    if (fraction * points) % 1:
        return {}
    after = [point for point in curve if point["fraction"] >= fraction]
    return after[0] if after and after[0]["fraction"] < fraction + 1 / points else {}


def _cells(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every field by dotted name; lists and mappings as JSON."""
    for name, value in asdict(config).items():
        inner = {f"{name}.{key}": cell for key, cell in value.items()} if isinstance(value, dict) else {name: value}
        for key, cell in inner.items():
            yield key, json.dumps(cell) if isinstance(cell, list | tuple | dict) else cell


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
