"""What the tests of evaluation share beside fixtures."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cramjax.language_model import LanguageModel

MakeModel = Callable[..., LanguageModel]
WriteTask = Callable[..., Path]


def write_rows(file: Path, rows: Iterable[Any]) -> Path:
    """Rows as JSON lines; a text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def local_task(name: str, file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A task of lm-evaluation-harness over rows of a local file."""
    files = {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "cache")}
    given = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
    return {**config, "task": name, **given, "training_split": None, "validation_split": None, "test_split": "test"}


def run_harness(model: Any, tasks: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """What the harness's evaluation gives."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)


def harness_answers(results: dict[str, Any], name: str) -> np.ndarray:
    """The log-likelihoods of a task, of all choices in order."""
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return np.array([float(each[0]) for sample in samples for each in sample["filtered_resps"]])
