"""What tests of sweeps ask of a sweep's directory."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cramjax.scaling.sweep.results import TIMES


def mark_checkpointed(out: Path) -> set[Path]:
    """Leave a file in every run directory that has a checkpoint: it is gone if the run begins again."""
    marked = {folder.parent / "marked" for folder in out.glob("runs/*/checkpoints") if any(folder.iterdir())}
    for mark in marked:
        mark.touch()
    return marked


def table(out: Path) -> list[dict[str, Any]]:
    """The rows of a sweep, without what differs from one execution to the next."""
    rows = pq.read_table(out / "runs.parquet").to_pylist()
    return [{key: cell for key, cell in row.items() if key not in TIMES} for row in rows]
