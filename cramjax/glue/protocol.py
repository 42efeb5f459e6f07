"""The tasks of the protocol: GLUE's as a table, and others by a `task.yaml`; what was published stands beside.

Source: Geiping & Goldstein 2022, arXiv:2212.14034, section 5 and `GLUE_sane.yaml`; Wang et al. 2018, arXiv:1804.07461.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cramjax.errors import ConfigError, DataError
from cramjax.loading import did_you_mean, load

EPOCHS = 5
SEEDS = 5
ENDINGS = (".tsv", ".jsonl", ".json", ".parquet", ".csv")


@dataclass(frozen=True)
class Task:
    """A task: rows to train on, rows to be scored on, and the score. A `task.yaml` holds these fields."""

    name: str = ""
    """What it is called. Default: its directory's name."""
    train: str = "train.jsonl"
    """Rows to train on: a file beside `task.yaml`, or a path."""
    validation: str = "validation.jsonl"
    """Rows to be scored on."""
    metric: Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"] = "accuracy"
    """The score; f1 is of the second of two classes, macro_f1 the mean of that of three or more."""
    fields: dict[str, str] = field(default_factory=dict)
    """Names of fields where they are not `text`, `pair` and `label`."""
    target: Literal["class", "number"] = "class"
    """What a label is: a class, or a number to be predicted itself."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers. Default: those found in the training rows, sorted."""


@dataclass(frozen=True)
class GlueTask:
    """One of GLUE's, by the files that its users have."""

    directories: tuple[str, ...]
    """Names of its directory, in the GLUE download and as Hugging Face has it."""
    text: tuple[str, ...]
    """Names of the field of the text, or the first of two: in TSV files and in others."""
    pair: tuple[str, ...]
    """The same of the second; none: one text."""
    label: tuple[str, ...]
    labels: tuple[str, ...]
    """Names in the order of Hugging Face's numbers; none: numbers to be predicted."""
    metric: str
    validation: Mapping[str, tuple[str, ...]]
    """Name of each score, and the stems of the files that it is of."""
    columns: tuple[str, ...] = ()
    """Of TSV files without a line that names them."""


def _dev(name: str) -> dict[str, tuple[str, ...]]:
    return {name: ("dev", "validation")}


_SAME = ("not_equivalent", "equivalent")
_QNLI = ("entailment", "not_entailment")
_MNLI = {
    "mnli": ("dev_matched", "validation_matched"),
    "mnli-mm": ("dev_mismatched", "validation_mismatched"),
}
GLUE: dict[str, GlueTask] = {
    "mnli": GlueTask(
        ("MNLI", "mnli"),
        ("sentence1", "premise"),
        ("sentence2", "hypothesis"),
        ("gold_label", "label"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        _MNLI,
    ),
    "sst2": GlueTask(
        ("SST-2", "sst2"), ("sentence",), (), ("label",), ("negative", "positive"), "accuracy", _dev("sst2")
    ),
    "stsb": GlueTask(
        ("STS-B", "stsb"), ("sentence1",), ("sentence2",), ("score", "label"), (), "pearson", _dev("stsb")
    ),
    "rte": GlueTask(
        ("RTE", "rte"), ("sentence1",), ("sentence2",), ("label",), _QNLI, "accuracy", _dev("rte")
    ),
    "qnli": GlueTask(
        ("QNLI", "qnli"), ("question",), ("sentence",), ("label",), _QNLI, "accuracy", _dev("qnli")
    ),
    "qqp": GlueTask(
        ("QQP", "qqp"), ("question1",), ("question2",), ("is_duplicate", "label"),
        ("not_duplicate", "duplicate"), "f1", _dev("qqp"),
    ),
    "mrpc": GlueTask(
        ("MRPC", "mrpc"), ("#1 String", "sentence1"), ("#2 String", "sentence2"), ("Quality", "label"), _SAME, "f1",
        _dev("mrpc"),
    ),
    "cola": GlueTask(
        ("CoLA", "cola"), ("sentence",), (), ("label",), ("unacceptable", "acceptable"), "matthews", _dev("cola"),
        columns=("source", "label", "judgement", "sentence"),
    ),
}  # fmt: skip
"""Cramming's eight tasks, which give nine scores; WNLI is not among them."""

ENTRIES = tuple(entry for task in GLUE.values() for entry in task.validation)
PUBLISHED: dict[str, tuple[float, ...]] = {
    "BERT-base, fully trained": (83.2, 83.4, 91.9, 86.7, 59.2, 90.6, 87.7, 89.3, 56.5),
    "no pretraining": (34.1, 34.1, 79.9, 17.8, 47.3, 50.0, 68.6, 77.9, 0.0),
    "RoBERTa-base": (86.6, 86.4, 93.7, 90.4, 77.3, 92.1, 88.3, 91.4, 60.2),
    "crammed BERT, A6000, 24 h": (83.9, 84.1, 92.2, 84.6, 53.8, 89.5, 87.3, 87.5, 44.5),
}
"""What Geiping & Goldstein report, in percent, by the entries above; nothing of it was measured here."""


def load_tasks(data: str | Path, names: Sequence[str] | None = None) -> dict[str, "GlueTask | Task"]:
    """The tasks in a directory, by name: directories with a `task.yaml`, or GLUE's.

    Args:
        data: the directory; or one with a `task.yaml` of its own.
        names: which. Default: all that are there.

    Raises:
        DataError: there is none, or one asked for is not there.
        ConfigError: a `task.yaml` says what cannot be; or GLUE's tasks and others are mixed.
    """
    path = Path(data).expanduser()
    if not path.is_dir():
        raise DataError(f"{path} is not a directory: give one that holds directories of tasks.")
    found: dict[str, GlueTask | Task] = {}
    for file in [path / "task.yaml", *sorted(path.glob("*/task.yaml"))]:
        if file.is_file():
            task = _described(file)
            if task.name in found:
                raise ConfigError(f"{file}: there are two tasks called {task.name!r}: give one another name.")
            found[task.name] = task
    glue = {name: task for name, task in GLUE.items() if any((path / each).is_dir() for each in task.directories)}
    glue = {name: task for name, task in glue.items() if directory_of(path, task) is not None}
    if found and glue:
        raise ConfigError(
            f"{path} holds tasks of its own ({', '.join(found)}) and GLUE's ({', '.join(glue)}): keep these apart."
        )
    found |= glue
    if not found:
        raise DataError(
            f"{path} holds no task: neither GLUE's directories ({', '.join(t.directories[0] for t in GLUE.values())}) "
            "nor any with a task.yaml."
        )
    for name in names or ():
        if name not in found:
            raise DataError(f"there is no task {name!r} in {path}{did_you_mean(name, list(found))} It has: "
                            f"{', '.join(found)}.")  # fmt: skip
    return {name: task for name, task in found.items() if not names or name in names}


def directory_of(data: Path, task: GlueTask) -> Path | None:
    """Where the files of one of GLUE's tasks are; None: nowhere (a directory with a `task.yaml` is another's)."""
    each = [data / name for name in task.directories]
    return next((path for path in each if path.is_dir() and not (path / "task.yaml").exists()), None)


def _described(file: Path) -> Task:
    task = load(Task, file)
    known = {"text", "pair", "label"}
    if wrong := [name for name in task.fields if name not in known]:
        raise ConfigError(f"{file}: fields names {wrong[0]!r}, and tasks have text, pair, label.")
    numbers = task.metric in ("pearson", "spearman")
    if numbers != (task.target == "number"):
        raise ConfigError(f"{file}: metric {task.metric} is not of target {task.target}: change one.")
    named = {key: str((file.parent / getattr(task, key)).absolute()) for key in ("train", "validation")}
    return Task(task.name or file.parent.name, named["train"], named["validation"], task.metric, task.fields,
                task.target, task.labels)  # fmt: skip
