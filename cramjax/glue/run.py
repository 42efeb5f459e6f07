"""Runs the protocol: for each task and seed a model is tuned by one set of hyperparameters, and scored at its end."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cramjax.cache import write_atomically
from cramjax.config import RunConfig
from cramjax.data.examples import labelled_rows
from cramjax.errors import RunError
from cramjax.evaluation.labels import evaluate_labels
from cramjax.evaluation.results import Score
from cramjax.glue.protocol import EPOCHS, SEEDS, GlueTask, Task, load_tasks
from cramjax.glue.results import SeedScores, TaskResult, Tuned
from cramjax.glue.rows import Rows, rows_of
from cramjax.loading import Overrides
from cramjax.recipes import load_recipe, override, to_yaml
from cramjax.training import resume, train
from cramjax.training.continuing import continued, given_vocabulary
from cramjax.training.display import Display

RECIPE = "tune-classify"


def run_protocol(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    seeds: int = SEEDS,
    epochs: float = EPOCHS,
    overrides: Overrides = (),
    display: Display | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Tuned:
    """Tune a model on tasks by Cramming's protocol; what is done already in the directory is not done again.

    Args:
        model: a run or a model directory.
        data: the directory of the tasks, see `cramjax.glue.protocol.load_tasks`.
        out: the directory of runs and scores.
        tasks: names of tasks. Default: all that are there.
        seeds: runs of each task, from seed 0.
        epochs: over the training rows.
        overrides: changes to the recipe `tune-classify`; the same for all tasks.
        display: shows each run.
        say: is told what is being done.

    Raises:
        UserError: tasks, rows or the model cannot be used, or the directory holds scores of another model or recipe.
    """
    data, out = Path(data).expanduser(), Path(out).expanduser()
    found = load_tasks(data, tasks)
    base = override(load_recipe(RECIPE, overrides), {"start_from": str(model)})
    results, notes = [], []
    glue = all(isinstance(task, GlueTask) for task in found.values())
    prepared = {name: rows_of(name, task, data, out / "rows") for name, task in found.items()}
    for name, task in found.items():
        rows = prepared[name]
        if rows.skipped:
            notes.append(f"{name}: {rows.skipped:,} rows lack a text, and are left out")
        config = config_of(base, task, rows, epochs)
        identity = _identity(config)
        done = []
        for seed in range(seeds):
            say(f"{name}, seed {seed}")
            done.append(_seed(dataclasses.replace(config, seed=seed), rows, task, out / name, identity, display))
        results += _results(done, task, rows, config)
    settings = {"recipe": to_yaml(base), "epochs": epochs, "seeds": seeds}
    return Tuned(str(model), glue, tuple(results), settings, tuple(notes))


def config_of(base: RunConfig, task: GlueTask | Task, rows: Rows, epochs: float) -> RunConfig:
    """The run of a task: the one set of hyperparameters, and as many steps as the epochs are."""
    assert base.labels is not None and base.start_from is not None, "the recipe tunes on labels"
    target = "number" if _metric(task) in ("pearson", "spearman") else "class"
    first = next(iter(rows.validation.values()))
    labels = dataclasses.replace(
        base.labels,
        source=rows.train,
        validation=first,
        target=target,
        names=rows.names,
        pairs=rows.pairs,
        fields=rows.fields,
    )
    config = continued(dataclasses.replace(base, labels=labels))
    tokenizer, _ = given_vocabulary(config, Path(config.start_from or ""))
    assert config.labels is not None
    count = len(labelled_rows(config.labels, tokenizer, config.data.sequence_length))
    steps = max(1, round(epochs * count / config.batch.size))
    return dataclasses.replace(config, budget=f"{steps}steps")


def _metric(task: GlueTask | Task) -> str:
    return task.metric


def _identity(config: RunConfig) -> str:
    """What tells a run from those of another model, recipe or data."""
    return hashlib.sha256(to_yaml(dataclasses.replace(config, seed=0)).encode()).hexdigest()[:16]


def _seed(
    config: RunConfig, rows: Rows, task: GlueTask | Task, directory: Path, identity: str, display: Display | None
) -> SeedScores:
    """The scores of one seed, from its file if it is done; an interrupted run is continued."""
    file, run_directory = directory / f"seed-{config.seed}.json", directory / f"seed-{config.seed}"
    if file.is_file():
        return _read(file, identity)
    if (run_directory / "config.yaml").is_file() and not (run_directory / "summary.json").is_file():
        run: Any = resume(run_directory, display=display)
    else:
        shutil.rmtree(run_directory, ignore_errors=True)
        run = train(config, run_directory, display=display)
    scores = {}
    for entry, source in rows.validation.items():
        made = evaluate_labels(run, source, fields=rows.fields, seed=0).tasks[0]
        scores[entry] = {"items": made.items, **dataclasses.asdict(made[_metric(task)])}
    summary = run.summary
    content = {"identity": identity, "seed": config.seed, "scores": scores, "steps": summary["steps"],
               "seconds": summary["train_seconds"]}  # fmt: skip
    write_atomically(file, json.dumps(content, indent=1) + "\n")
    shutil.rmtree(run_directory)  # its checkpoints are many times what the model is
    return _read(file, identity)


def _read(file: Path, identity: str) -> SeedScores:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        scores = {
            entry: Score(made["name"], made["value"], made["interval"] and tuple(made["interval"]))
            for entry, made in read["scores"].items()
        }
        if read["identity"] == identity:
            return SeedScores(read["seed"], scores, read["steps"], read["seconds"])
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{file} is damaged: remove it, and run the same command again.") from None
    raise RunError(
        f"{file} is of another model, recipe or data than this: give another directory as --out, or the same command."
    )


def _results(done: Sequence[SeedScores], task: GlueTask | Task, rows: Rows, config: RunConfig) -> list[TaskResult]:
    assert config.labels is not None
    found = []
    for entry, source in rows.validation.items():
        labels = dataclasses.replace(config.labels, source=source)
        tokenizer, _ = given_vocabulary(config, Path(config.start_from or ""))
        items = len(labelled_rows(labels, tokenizer, config.data.sequence_length))
        seeds, scores = tuple(each.seed for each in done), tuple(each.scores[entry] for each in done)
        found.append(TaskResult(entry, _metric(task), items, seeds, scores))
    return found
