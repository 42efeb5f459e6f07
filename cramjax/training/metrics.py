"""A run's log: one JSON object a line in `metrics.jsonl`, and the same numbers as TensorBoard scalars."""

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from cramjax.cache import write_atomically

Record = dict[str, Any]

# What every record of a kind has, at least.
_NEEDED: dict[str, dict[str, Any]] = {
    "train": {},
    "evaluate": {},
    "event": {"name": str},
    "sample": {"prompt": str, "text": str},
}


class RunLog:
    """Appends records to `metrics.jsonl` and TensorBoard events; a record is on disk when `write` returns.

    Args:
        directory: the run directory.
        last_step: the step that the run starts or resumes from: later lines belong to work that was lost, and go.
    """

    damaged = 0
    """Lines that were no records, and are left out; not counting a last one, cut short by a kill."""

    def __init__(self, directory: Path, last_step: int):
        path = directory / "metrics.jsonl"
        resumed = path.exists()
        if resumed:
            records, self.damaged = _parsed(path)
            kept = [record for record in records if record.get("step", 0) <= last_step]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(directory), purge_step=last_step + 1 if resumed else None)

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
    """The records of a run's `metrics.jsonl`; lines that are damaged, or cut short by a kill, are left out."""
    path = directory / "metrics.jsonl"
    return _parsed(path)[0] if path.exists() else []


def _parsed(path: Path) -> tuple[list[Record], int]:
    """Records, and how many of the lines before the last are none."""
    lines = path.read_bytes().split(b"\n")
    read = [_record(line) for line in lines]
    return [record for record in read if record is not None], read[:-1].count(None)


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
        needed = _NEEDED[record["kind"]]
    except (ValueError, TypeError, KeyError):
        return None
    return record if all(isinstance(record.get(key), type_) for key, type_ in needed.items()) else None
