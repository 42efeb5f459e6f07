"""A trained model as it is given: a run, a model, or the path of either."""

from pathlib import Path
from typing import Literal

from cramjax.language_model import LanguageModel, load_model
from cramjax.model_yaml import is_model_directory
from cramjax.training.run import Run, load_run

Given = Run | LanguageModel | str | Path


def load(path: str | Path, checkpoint: Literal["best", "latest"] = "latest") -> Run | LanguageModel:
    """Load a run directory or a model directory.

    Args:
        path: the directory.
        checkpoint: of a run: the newest, or the one with the lowest held-out bits per byte.

    Raises:
        UserError: it is neither, or a file of it is damaged.
    """
    return load_model(path) if is_model_directory(path) else load_run(path, checkpoint)


def language_model(given: Given) -> LanguageModel:
    """The model of what is given.

    Raises:
        UserError: a path is neither a run nor a model directory.
    """
    if isinstance(given, str | Path):
        given = load(given)
    return given.language_model if isinstance(given, Run) else given
