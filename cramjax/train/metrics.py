"""A run's log: one JSON object a line in `metrics.jsonl`, and the same numbers as TensorBoard scalars."""

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

Record = dict[str, Any]


class RunLog:
    """Appends records to `metrics.jsonl` and TensorBoard events; a record is on disk when `write` returns.

    Args:
        directory: the run directory.
        last_step: on resume, the step of the checkpoint: later lines belong to work that was lost and are dropped.
    """

    def __init__(self, directory: Path, last_step: int | None = None):
        path = directory / "metrics.jsonl"
        if last_step is not None and path.exists():
            kept = [record for record in read_records(directory) if record.get("step", 0) <= last_step]
            path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a")
        self._events = SummaryWriter(str(directory), purge_step=None if last_step is None else last_step + 1)

    def write(self, kind: str, **values: Any) -> Record:
        """Add one record of a kind (`train`, `evaluate`, `event`, `sample`) and return it."""
        record = {"kind": kind, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        step = values.get("step", 0)
        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                self._events.add_scalar(f"{kind}/{name}", value, step)
        if kind == "sample":
            self._events.add_text("sample", f"**{values['prompt']}**{values['text']}", step)
        return record

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._events.close()


def read_records(directory: Path) -> list[Record]:
    """The records of a run's `metrics.jsonl`; a last line cut short by a kill is left out."""
    path = directory / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
