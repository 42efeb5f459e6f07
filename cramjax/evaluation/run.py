"""Score models on tasks: read rows, make requests of all tasks, then ask the model."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cramjax.data.records import Record
from cramjax.errors import ConfigError, DataError
from cramjax.evaluation.results import ScoreComparison, Scores, TaskScores, differences_of, scores_of
from cramjax.evaluation.rows import read_rows
from cramjax.evaluation.scoring import Measured, prepare
from cramjax.evaluation.task import Task, check_task, load_task
from cramjax.loading import leaves_of
from cramjax.training.given import Given, language_model

Named = str | os.PathLike[str] | Task
"""A task's name, the path of its YAML file, or the task."""
Data = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]
"""Where the rows of the task are, or of each task by its name."""
Tell = Callable[[str, int, int], None]
"""Is told what is being done, and how many of how many rows are."""


@dataclass(frozen=True)
class _Read:
    """A task with its rows."""

    task: Task
    rows: list[Record]
    examples: list[Record]
    settings: dict[str, Any]


def evaluate_tasks(
    given: Given,
    tasks: Named | Sequence[Named],
    *,
    data: Data | None = None,
    limit: int | None = None,
    seed: int = 0,
    tell: Tell | None = None,
) -> Scores:
    """Score a model on tasks. Mistakes in tasks, rows and models are found before anything is scored.

    Args:
        given: a run or a model, or the path of one.
        tasks: names of tasks (`cramjax.evaluation.task_names()`), paths of YAML files, or tasks.
        data: where the rows of the one task are, or a mapping of tasks' names to it, in the place of their own.
        limit: most rows of each task, the first ones.
        seed: of the bootstrap.
        tell: is told how far it is.

    Raises:
        ConfigError: there is no such task, it is none, or the same twice.
        DataError: rows cannot be read or used.
        RunError: the model cannot do a task.
    """
    read = _read_all(tasks, data, limit)
    return _score([given], read, seed, tell)[0][0]


def compare_on_tasks(
    a: Given,
    b: Given,
    tasks: Named | Sequence[Named],
    *,
    data: Data | None = None,
    limit: int | None = None,
    seed: int = 0,
    tell: Tell | None = None,
) -> ScoreComparison:
    """Score two models on the same items; arguments and errors as of `evaluate_tasks`."""
    read = _read_all(tasks, data, limit)
    (scores_a, measured_a), (scores_b, measured_b) = _score([a, b], read, seed, tell)
    found = [
        differences_of(each.task.name, own, other, seed)
        for each, own, other in zip(read, measured_a, measured_b, strict=True)
    ]
    return ScoreComparison(scores_a, scores_b, tuple(difference for each in found for difference in each))


def _score(
    given: Sequence[Given], read: Sequence[_Read], seed: int, tell: Tell | None
) -> list[tuple[Scores, list[Measured]]]:
    models = [language_model(each) for each in given]
    work = [[prepare(model, each.task, each.rows, each.examples) for each in read] for model in models]
    results = []
    for model, own in zip(models, work, strict=True):
        measured = []
        for each, ask in zip(read, own, strict=True):
            what = f"{model.path}: {each.task.name}"
            measured.append(ask(None if tell is None else lambda done, of, what=what: tell(what, done, of)))
        scores = [
            TaskScores(
                task=each.task.name,
                kind=each.task.kind,
                items=len(each.rows),
                scores=scores_of(found, seed),
                notes=found.notes,
                settings=each.settings,
            )
            for each, found in zip(read, measured, strict=True)
        ]
        results.append((Scores(str(model.path), tuple(scores), seed), measured))
    return results


def _read_all(tasks: Named | Sequence[Named], data: Data | None, limit: int | None) -> list[_Read]:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be 1 or more, got {limit}: leave it out to score all rows.")
    listed = [tasks] if isinstance(tasks, str | os.PathLike | Task) else list(tasks)
    if not listed:
        raise ConfigError("there are no tasks: give one or more.")
    loaded = [_checked(task) if isinstance(task, Task) else load_task(task) for task in listed]
    names = [task.name for task in loaded]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two tasks are called {twice[0]}: give each once, or copy its file under another name.")
    if data is not None and not isinstance(data, Mapping):
        if len(loaded) > 1:
            raise ConfigError(f"data is of one task, and there are {len(loaded)}: say of which ({names[0]}=FILE).")
        data = {names[0]: data}
    if unknown := [name for name in data or () if name not in names]:
        raise ConfigError(f"data is given for {unknown[0]}, which is no task here: {', '.join(names)}.")
    return [_read(task, task.source((data or {}).get(task.name)), limit) for task in loaded]


def _checked(task: Task) -> Task:
    check_task(task.config)
    return task


def _read(task: Task, source: str | os.PathLike[str], limit: int | None) -> _Read:
    """A task's rows: of one source, examples are the first."""
    config = task.config
    most = min((bound for bound in (limit, config.limit) if bound is not None), default=None)
    shots = 0 if config.fewshot is None else config.fewshot.examples
    apart = task.fewshot_source()
    rows = read_rows(os.fspath(source), config.split)
    if apart is None:
        examples = list(islice(rows, shots))
    else:
        assert config.fewshot is not None
        examples = list(islice(read_rows(apart, config.fewshot.split), shots))
    if len(examples) < shots:
        raise DataError(f"{apart or source} has {len(examples)} rows, too few for {shots} examples.")
    scored = list(islice(rows, most))
    if not scored:
        after = f" after the {shots} that are examples" if shots and apart is None else ""
        raise DataError(f"{source} has no rows{after}: a task needs one or more.")
    plain = {key: value for key, value in leaves_of(config).items() if value not in (None, "", False)}
    digest = hashlib.sha256(json.dumps([row.values for row in scored], default=str, sort_keys=True).encode())
    settings = {**plain, "data": str(source), "rows_sha256": digest.hexdigest()}
    return _Read(task, scored, examples, settings | ({"limit": most} if most is not None else {}))
