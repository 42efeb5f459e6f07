"""Runs the protocol: for each task and seed a model is tuned by one set of hyperparameters, and scored at its end."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cramjax.cache import write_atomically
from cramjax.config import RunConfig
from cramjax.data.examples import labelled_rows
from cramjax.errors import ConfigError, RunError
from cramjax.evaluation.labels import evaluate_labels, require_metric
from cramjax.evaluation.results import Score
from cramjax.glue.protocol import EPOCHS, SEEDS, GlueTask, Task, load_tasks
from cramjax.glue.results import SeedScores, TaskResult, Tuned
from cramjax.glue.rows import Rows, rows_of
from cramjax.loading import Overrides
from cramjax.recipes import differing_fields, load_recipe, override, to_yaml
from cramjax.training import resume, train
from cramjax.training.based import weights_digest
from cramjax.training.continuing import continued, model_vocabulary
from cramjax.training.display import Display

RECIPE = "tune-classify"
_SET_HERE = ("budget", "seed", "start_from", *(f"labels.{name}" for name in
             ("source", "validation", "target", "names", "pairs", "fields")))  # fmt: skip
"""Fields that tasks, seeds and epochs decide."""


@dataclass(frozen=True)
class _Job:
    """A task, before its seeds are run."""

    name: str
    task: GlueTask | Task
    rows: Rows
    config: RunConfig
    identity: str
    """What tells its runs from those of another model, recipe or data, whatever their names."""


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
        UserError: tasks, rows, overrides or the model cannot be used, or the directory holds scores of others.
    """
    data, out = Path(data).expanduser(), Path(out).expanduser()
    found = load_tasks(data, tasks)
    recipe = load_recipe(RECIPE, overrides)
    notes = _departures(recipe, epochs, seeds)
    base, results = override(recipe, {"start_from": str(model)}), []
    glue = all(isinstance(task, GlueTask) for task in found.values())
    rows = {name: rows_of(name, task, data, out / "rows") for name, task in found.items()}
    for job in _jobs(found, rows, base, epochs):
        if job.rows.without_text:
            notes.append(f"{job.name}: {job.rows.without_text:,} rows lack a text, and are left out")
        if job.rows.without_label:
            notes.append(f"{job.name}: {job.rows.without_label:,} rows whose label is - (annotators did not agree) are "
                         "left out")  # fmt: skip
        done = []
        for seed in range(seeds):
            say(f"{job.name}, seed {seed}")
            done.append(_seed(job, seed, out / job.name, display))
        results += _results(done, job)
    settings = {"recipe": to_yaml(base), "epochs": epochs, "seeds": seeds}
    return Tuned(str(model), glue, tuple(results), settings, tuple(notes))


def _departures(recipe: RunConfig, epochs: float, seeds: int) -> list[str]:
    """What of a run of the protocol is not Cramming's, a sentence each."""
    plain = load_recipe(RECIPE)
    changed: dict[str, tuple[Any, Any]] = {}
    for key, (was, now) in differing_fields(plain, recipe).items():
        if key in _SET_HERE:
            raise ConfigError(
                f"{key} is decided by the tasks, seeds and epochs of `cramjax glue`, got {now!r}: leave it out."
            )
        group = key.partition(".")[0]
        changed |= {group: ("none", "given")} if getattr(plain, group) is None else {key: (was, now)}
    changed |= {"epochs": (EPOCHS, epochs)} if epochs != EPOCHS else {}
    changed |= {"seeds": (SEEDS, seeds)} if seeds != SEEDS else {}
    return [f"not Cramming's protocol: {key} {now}, where it has {was}" for key, (was, now) in changed.items()]


def _jobs(tasks: Mapping[str, GlueTask | Task], rows: Mapping[str, Rows], base: RunConfig, epochs: float) -> list[_Job]:
    """All tasks; what cannot be is refused before the first is trained."""
    configs = {name: config_of(base, task, rows[name], epochs) for name, task in tasks.items()}
    for name, config in configs.items():
        assert config.labels is not None, "the recipe tunes on labels"
        try:
            require_metric(tasks[name].metric, len(config.labels.names))
        except ConfigError as error:
            raise ConfigError(f"metric of task {name}: {error}") from None
    model = base.start_from or ""
    given = [weights_digest(model), model_vocabulary(model)[0].to_json()]
    jobs = []
    for name, config in configs.items():
        parts = [to_yaml(dataclasses.replace(config, seed=0)), rows[name].digest(), *given]
        identity = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        jobs.append(_Job(name, tasks[name], rows[name], config, identity))
    return jobs


def config_of(base: RunConfig, task: GlueTask | Task, rows: Rows, epochs: float) -> RunConfig:
    """The run of a task: the one set of hyperparameters, and as many steps as the epochs are."""
    assert base.labels is not None and base.start_from is not None, "the recipe tunes on labels"
    target = "number" if task.metric in ("pearson", "spearman") else "class"
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
    steps = max(1, round(epochs * _count(config, rows.train) / config.batch.size))
    return dataclasses.replace(config, budget=f"{steps}steps")


def _count(config: RunConfig, source: str) -> int:
    """Rows of a source, without those that are dropped."""
    assert config.labels is not None and config.start_from is not None, "a run on labels"
    labels = dataclasses.replace(config.labels, source=source)
    tokenizer, _ = model_vocabulary(config.start_from)
    return len(labelled_rows(labels, tokenizer, config.data.sequence_length))


def _seed(job: _Job, seed: int, directory: Path, display: Display | None) -> SeedScores:
    """The scores of one seed, from its file if it is done; an interrupted run is continued, if it is the same."""
    file, run_directory = directory / f"seed-{seed}.json", directory / f"seed-{seed}-{job.identity}"
    if file.is_file():
        return _read(file, job.identity)
    for other in (directory / f"seed-{seed}", *directory.glob(f"seed-{seed}-*")):
        if other != run_directory:
            shutil.rmtree(other, ignore_errors=True)
    if (run_directory / "config.yaml").is_file() and not (run_directory / "summary.json").is_file():
        run: Any = resume(run_directory, display=display)
    else:
        shutil.rmtree(run_directory, ignore_errors=True)
        run = train(dataclasses.replace(job.config, seed=seed), run_directory, display=display)
    scores = {}
    for entry, source in job.rows.validation.items():
        made = evaluate_labels(run, source, fields=job.rows.fields, seed=0).tasks[0]
        scores[entry] = {"items": made.items, **dataclasses.asdict(made[job.task.metric])}
    summary = run.summary
    content = {"identity": job.identity, "seed": seed, "scores": scores, "steps": summary["steps"],
               "seconds": summary["train_seconds"]}  # fmt: skip
    write_atomically(file, json.dumps(content, indent=1) + "\n")
    shutil.rmtree(run_directory)  # its checkpoints are many times what the model is
    return _read(file, job.identity)


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
        f"{file} is of another model, recipe or data than these now are: give another directory as --out, or remove it."
    )


def _results(done: Sequence[SeedScores], job: _Job) -> list[TaskResult]:
    found = []
    for entry, source in job.rows.validation.items():
        seeds, scores = tuple(each.seed for each in done), tuple(each.scores[entry] for each in done)
        found.append(TaskResult(entry, job.task.metric, _count(job.config, source), seeds, scores))
    return found
