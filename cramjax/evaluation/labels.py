"""Score a model that gives labels on labelled texts: accuracy, F1, Matthews, Pearson, Spearman, with intervals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from scipy.stats import rankdata

from cramjax.compiling import BRIEF, jit
from cramjax.data.examples import LabelledFile, LabelsConfig, labelled_rows
from cramjax.errors import ConfigError, DataError, RunError
from cramjax.evaluation.bootstrap import interval_of, interval_of_difference
from cramjax.evaluation.results import Score, ScoreComparison, ScoreDifference, Scores, TaskScores
from cramjax.language_model import LanguageModel
from cramjax.model import Model
from cramjax.model.ragged import Ragged
from cramjax.serve.lengths import batches, costs_of, ragged_of
from cramjax.training import Run
from cramjax.training.given import Given, language_model, load
from cramjax.training.opening import prepared_data

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""`(given, predicted) -> score`, along the last axis."""


@dataclass(frozen=True)
class Predictions:
    """What a model says of labelled texts."""

    given: Float[np.ndarray, " texts"]
    """Labels: numbers of classes, or numbers."""
    outputs: Float[np.ndarray, "texts outputs"]
    """Logits of classes, or the number predicted."""
    classes: tuple[str, ...]
    """Names of the classes; none where labels are numbers."""

    @property
    def predicted(self) -> Float[np.ndarray, " texts"]:
        """The likeliest class of each text, or the number."""
        return self.outputs.argmax(axis=1).astype(np.float64) if self.classes else self.outputs[:, 0]

    def score(self, metric: str) -> float:
        """A score by its name; 0 where it is undefined, as of predictions that are all the same.

        Raises:
            ConfigError: there is no such score of these labels.
        """
        return float(_statistic(metric, self.classes)(self.given, self.predicted))


def metrics_of(classes: int) -> tuple[str, ...]:
    """Names of the scores of so many classes; 0: of numbers."""
    if not classes:
        return ("pearson", "spearman", "mean_squared_error")
    return ("accuracy", "f1", "matthews") if classes == 2 else ("accuracy", "macro_f1", "matthews")


def require_metric(metric: str, classes: int) -> None:
    """Refuse a score that labels do not have.

    Args:
        metric: its name.
        classes: how many there are; 0: labels are numbers.

    Raises:
        ConfigError: it is so; the message says which there are.
    """
    if metric not in metrics_of(classes):
        kind = f"{classes} classes" if classes else "numbers"
        known = ", ".join(metrics_of(classes))
        raise ConfigError(f"{metric!r} is no score of labels that are {kind}: choose of {known}.")


def evaluate_labels(
    given: Given, files: str | list[str] | None = None, *, fields: Mapping[str, str] | None = None, seed: int = 0
) -> Scores:
    """Score a model that gives labels on labelled texts.

    Args:
        given: a run or a model tuned on labels, or the path of one.
        files: labelled rows, as `labels.source` takes them. Default: a run's own held-out rows; a model has none.
        fields: names of fields where they are not `text`, `pair` and `label`, as of `labels.fields`. Default: a run's.
        seed: of the bootstrap.

    Raises:
        RunError: the model gives no labels, or there are no files.
        DataError: rows cannot be used; the message names the row.
    """
    if isinstance(given, str | Path):
        given = load(given)
    model = language_model(given)
    own = given.config.labels if isinstance(given, Run) else None
    if files is None:
        if not isinstance(given, Run) or own is None:
            raise RunError(f"{model.path} has no held-out labels of its own: give files (--labels FILE).")
        file: Any = prepared_data(given.config, given.path, lambda _: None).validation
        name = "held-out labels"
    else:
        file = _read(model, own, files, fields)
        name = Path(files if isinstance(files, str) else files[0]).name
    made = predict(model, file)
    names = metrics_of(len(made.classes))
    scores = tuple(_score(made, metric, seed) for metric in names)
    settings = {"files": files, "rows": file.identity, "classes": list(made.classes)}
    return Scores(str(model.path), (TaskScores(name, "labels", len(file), scores, (), settings),), seed)


def compare_on_labels(
    a: Given, b: Given, files: str | list[str], *, fields: Mapping[str, str] | None = None, seed: int = 0
) -> ScoreComparison:
    """Score two models on the same labelled texts, and say whether they can be told apart.

    Args:
        a: as for `evaluate_labels`.
        b: the other, which gives labels of the same names.
        files: labelled rows.
        fields: as for `evaluate_labels`.
        seed: of the bootstrap.

    Raises:
        RunError: one gives no labels, or they give different ones.
        DataError: rows cannot be used; or one is given other rows than the other, because some are too long for it.
    """
    sides = [load(given) if isinstance(given, str | Path) else given for given in (a, b)]
    models = [language_model(given) for given in sides]
    (classes, other), paths = (_classes(model) for model in models), [str(model.path) for model in models]
    if classes != other:
        told = (", ".join(names) or "numbers" for names in (classes, other))
        raise RunError(f"{paths[0]} and {paths[1]} give different labels ({' and '.join(told)}): give two of a kind.")
    made = []
    for given, model in zip(sides, models, strict=True):
        own = given.config.labels if isinstance(given, Run) else None
        made.append(predict(model, _read(model, own, files, fields)))
    first, second = made
    if not np.array_equal(first.given, second.given):
        raise DataError(
            f"{paths[0]} is given {len(first.given):,} rows and {paths[1]} {len(second.given):,}, or other ones: some "
            "are too long for one. Shorten them, or set labels.overlong=cut where the models are tuned."
        )
    name, names = Path(files if isinstance(files, str) else files[0]).name, metrics_of(len(classes))
    settings = {"files": files, "classes": list(classes)}

    def scores(path: str, own: Predictions) -> Scores:
        each = tuple(_score(own, metric, seed) for metric in names)
        return Scores(path, (TaskScores(name, "labels", len(own.given), each, (), settings),), seed)

    differences = tuple(_difference(name, metric, first, second, seed) for metric in names)
    return ScoreComparison(scores(paths[0], first), scores(paths[1], second), differences)


def _difference(task: str, metric: str, a: Predictions, b: Predictions, seed: int) -> ScoreDifference:
    values, statistic = (a.score(metric), b.score(metric)), _statistic(metric, a.classes)
    interval = interval_of_difference(statistic, a.given, a.predicted, b.predicted, seed=seed)
    return ScoreDifference(task, metric, *values, values[1] - values[0], interval, metric != "mean_squared_error")


def _read(
    model: LanguageModel, own: LabelsConfig | None, files: str | list[str], fields: Mapping[str, str] | None
) -> LabelledFile:
    classes, classifier = _classes(model), model.config.classifier
    base = own or LabelsConfig(pairs=classifier and classifier.pairs)
    named = base.fields if fields is None else dict(fields)
    target = "class" if classes else "number"
    config = replace(base, source=files, validation=None, names=classes, target=target, fields=named)
    return labelled_rows(config, model.tokenizer, model.context)


def _classes(model: LanguageModel) -> tuple[str, ...]:
    if model.config.classifier is None:
        raise RunError(
            f"{model.path} gives no labels (it is {model.kind}): tune it on some (cramjax tune {model.path} "
            "tune-classify --labels.source=FILE)."
        )
    return model.config.classifier.labels


def predict(model: LanguageModel, file: LabelledFile) -> Predictions:
    """What a model says of labelled rows.

    Raises:
        RunError: it gives no labels.
    """
    classes, rows = _classes(model), [file.example(number) for number in range(len(file))]
    ids, types = [row.ids.tolist() for row in rows], [row.token_types.tolist() for row in rows]
    outputs = np.zeros((len(file), max(1, len(classes))))
    for batch in batches([len(row) for row in ids], costs_of(model, file.token_count)):
        found = _outputs(model.model, model.params, ragged_of(batch, ids, types if model.model.typed else None))
        outputs[list(batch.texts)] = np.asarray(found)[: len(batch.texts)]
    return Predictions(file.labels, outputs, classes)


@partial(jit, seconds=BRIEF, static_argnames="model")
def _outputs(model: Model, params: PyTree, texts: Ragged) -> Float[Array, "texts outputs"]:
    """What the head for labels gives of each text's first token, or of a causal model's last."""
    speaks = texts.starts + (jnp.maximum(texts.lengths - 1, 0) if model.causal else 0)
    return model.classify(params, model.unpadded(params, texts)[speaks], None)


def _score(made: Predictions, metric: str, seed: int) -> Score:
    statistic = _statistic(metric, made.classes)
    return Score(metric, made.score(metric), interval_of(statistic, made.given, made.predicted, seed=seed))


def _statistic(metric: str, classes: tuple[str, ...]) -> Statistic:
    require_metric(metric, len(classes))
    statistics: dict[str, Statistic] = {
        "accuracy": lambda given, predicted: (given == predicted).mean(-1),
        "f1": partial(_f1, 1),
        "macro_f1": lambda given, predicted: np.mean([_f1(n, given, predicted) for n in range(len(classes))], axis=0),
        "matthews": partial(_matthews, len(classes)),
        "pearson": _pearson,
        "spearman": lambda given, predicted: _pearson(rankdata(given, axis=-1), rankdata(predicted, axis=-1)),
        "mean_squared_error": lambda given, predicted: np.square(given - predicted).mean(-1),
    }
    return statistics[metric]


def _f1(positive: int, given: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Of one class, the harmonic mean of precision and recall."""
    both = ((given == positive) & (predicted == positive)).sum(-1)
    return _ratio(2 * both, (given == positive).sum(-1) + (predicted == positive).sum(-1))


def _matthews(classes: int, given: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Matthews' correlation; of more than two classes R_K (Gorodkin 2004): Pearson's of indicator vectors."""
    own = [(given == n).astype(np.float64) for n in range(classes)]
    theirs = [(predicted == n).astype(np.float64) for n in range(classes)]

    def covariance(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
        return np.sum([(x * y).mean(-1) - x.mean(-1) * y.mean(-1) for x, y in zip(a, b, strict=True)], axis=0)

    return _ratio(covariance(own, theirs), np.sqrt(covariance(own, own) * covariance(theirs, theirs)))


def _pearson(given: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    a = given - given.mean(-1, keepdims=True)
    b = predicted - predicted.mean(-1, keepdims=True)
    return _ratio((a * b).sum(-1), np.sqrt(np.square(a).sum(-1) * np.square(b).sum(-1)))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """0 where there is nothing to divide by."""
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.where(below > 1e-12, above / np.where(below > 1e-12, below, 1.0), 0.0)
