"""GLUE's files as rows of `text`, `pair` and `label`, whichever of its forms they have."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cramjax.cache import write_atomically
from cramjax.config import DataConfig
from cramjax.data.records import read_records
from cramjax.data.sources import find_sources
from cramjax.errors import DataError
from cramjax.glue.protocol import ENDINGS, GlueTask, Task, directory_of


@dataclass(frozen=True)
class Rows:
    """A task's rows as files that tuning and scoring read."""

    train: str
    validation: dict[str, str]
    """By the name of the score."""
    fields: dict[str, str]
    pairs: bool | None
    """None: if the fields name a pair, or the first row has one."""
    names: tuple[str, ...]
    without_text: int = 0
    """Rows left out because a text of theirs is missing or empty (QQP has some)."""
    without_label: int = 0
    """Rows left out because their label is `-`: annotators did not agree (MNLI has some)."""

    def digest(self) -> str:
        """SHA-256 of all files, which are read for it."""
        digest = hashlib.sha256()
        for source in find_sources([self.train, *self.validation.values()]):
            path = Path(source.name)
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in (file for file in files if file.is_file()):
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def rows_of(name: str, task: GlueTask | Task, data: Path, out: Path) -> Rows:
    """The rows of a task; GLUE's are written anew into a directory, in one form.

    Args:
        name: of the task.
        task: from `cramjax.glue.protocol.load_tasks`.
        data: where GLUE's files are.
        out: where rows of GLUE's go.

    Raises:
        DataError: a file is missing, or a row has a label that the task does not know.
    """
    if isinstance(task, Task):
        return Rows(task.train, {name: task.validation}, task.fields, None, task.labels)
    directory = directory_of(data, task)
    assert directory is not None, "a task that was found"
    wanted = {"train": ("train",), **task.validation}
    files, left_out = {}, Counter()
    for key, stems in wanted.items():
        source = _file(directory, stems)
        files[key] = out / f"{name}-{key}.jsonl"
        left_out += _convert(task, source, files[key])
    validation = {key: str(files[key]) for key in task.validation}
    return Rows(str(files["train"]), validation, {}, bool(task.pair), task.labels, left_out["text"], left_out["label"])


def _file(directory: Path, stems: tuple[str, ...]) -> Path:
    """The file of a split: `dev.tsv`, or as Hugging Face names shards, `validation-00000-of-00001.parquet`."""
    for stem in stems:
        for ending in ENDINGS:
            for found in (directory / f"{stem}{ending}", *sorted(directory.glob(f"{stem}-00000-of-00001*{ending}"))):
                if found.is_file():
                    return found
    raise DataError(f"{directory} has no {' or '.join(stems)} ({', '.join(ENDINGS)}): put the task's files there.")


def _convert(task: GlueTask, source: Path, target: Path) -> Counter[str]:
    """Write the rows of a file in one form; returns how many were left out for want of a `text` or a `label`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lines, left_out = [], Counter()
    for where, row in _read(task, source):
        texts = [_text(row, names, where) for names in (task.text, task.pair) if names]
        if not all(texts):
            left_out["text"] += 1
            continue
        given = _field(row, task.label, where)
        if given == "-":
            left_out["label"] += 1
            continue
        label = _label(task, given, where)
        lines.append(json.dumps(dict(zip(("text", "pair"), texts, strict=False)) | {"label": label}))
    if not lines:
        raise DataError(f"{source} has no rows.")
    write_atomically(target, "\n".join(lines) + "\n")
    return left_out


def _read(task: GlueTask, source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if source.suffix != ".tsv":
        for record in read_records(find_sources(str(source)), DataConfig()):
            yield record.where, dict(record.values)
        return
    with source.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = list(task.columns) or next(lines, [])
        for values in lines:  # Rows that are cut short lack their last fields.
            short = [None] * (len(names) - len(values))
            yield f"{source}, line {lines.line_num}", dict(zip(names, [*values, *short], strict=False))


def _field(row: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise DataError(f"{where}: no field {' or '.join(map(repr, names))}. It has {', '.join(map(str, row)) or 'none'}.")


def _text(row: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    """The text of a field; the empty one where it has none."""
    if not any(name in row for name in names):
        _field(row, names, where)
    return next((str(row[name]).strip() for name in names if row.get(name) is not None), "")


def _label(task: GlueTask, value: Any, where: str) -> str | float:
    if not task.labels:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise DataError(f"{where}: label {value!r} is no number. Correct it, or leave the row out.") from None
    name = str(value).strip()
    if name in task.labels:
        return name
    if name.isdigit() and int(name) < len(task.labels):
        return task.labels[int(name)]
    raise DataError(
        f"{where}: label {value!r} is not one of {', '.join(task.labels)} (0 to {len(task.labels) - 1}). Of test files "
        "the labels are not known; give train and dev."
    )
