"""What evaluating came to: the scores of a model on tasks, or of two on the same tasks. They print as tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from cramjax.evaluation.bootstrap import Measure
from cramjax.evaluation.scoring import Measured
from cramjax.show.numbers import Interval, ends, finite
from cramjax.show.values import Viewed

if TYPE_CHECKING:
    from cramjax.show.tables import Page


@dataclass(frozen=True)
class Score:
    """One number of a task."""

    name: str
    """`acc`, `acc_norm` (log-likelihoods divided by the characters of a choice, as lm-evaluation-harness 0.4.13 does,
    of which bytes are often said), `acc_bytes` (by its UTF-8 bytes), `exact_match`, `bits_per_byte`, `perplexity` (per
    token)."""
    value: float
    interval: Interval | None
    """95%, by the bootstrap over items; None for one item."""


@dataclass(frozen=True)
class TaskScores:
    """What a model reached in one task."""

    task: str
    kind: str
    items: int
    """Rows scored."""
    scores: tuple[Score, ...]
    notes: tuple[str, ...]
    """What a reader should know of them."""
    settings: Mapping[str, Any]
    """Of the task: its fields, where its rows are, and a digest of them."""

    def __getitem__(self, name: str) -> Score:
        """The score of a name."""
        return next(score for score in self.scores if score.name == name)

    def json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "kind": self.kind,
            "items": self.items,
            "scores": {s.name: {"value": finite(s.value), "interval": _ends(s.interval)} for s in self.scores},
            "notes": list(self.notes),
            "settings": dict(self.settings),
        }


@dataclass(frozen=True, repr=False)
class Scores(Viewed):
    """What a model reached in some tasks."""

    model: str
    """Where it is."""
    tasks: tuple[TaskScores, ...]
    seed: int
    """Of the bootstrap."""

    def __getitem__(self, task: str) -> TaskScores:
        """The scores of a task."""
        return next(scores for scores in self.tasks if scores.task == task)

    def json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "cramjax": version("cramjax"),
            "model": self.model,
            "seed": self.seed,
            "tasks": {scores.task: scores.json() for scores in self.tasks},
        }

    def __rich__(self) -> "Page":
        from cramjax.evaluation.show import scores

        return scores(self)


@dataclass(frozen=True)
class ScoreDifference:
    """How two models differ in one number of a task."""

    task: str
    name: str
    a: float
    b: float
    difference: float
    """B − A."""
    interval: Interval | None
    """95%, by the bootstrap over items, both models on the same ones; None for one item."""
    higher_is_better: bool

    @cached_property
    def verdict(self) -> str:
        """What the interval says, in words."""
        if self.interval is None:
            return "one item says nothing of others"
        low, high = self.interval
        if low <= 0 <= high:
            return "not told apart: the interval includes 0"
        return f"{'B' if (low > 0) == self.higher_is_better else 'A'} is better: the interval excludes 0"

    def json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "task": self.task,
            "score": self.name,
            "difference": finite(self.difference),
            "interval": _ends(self.interval),
            "verdict": self.verdict,
        }


@dataclass(frozen=True, repr=False)
class ScoreComparison(Viewed):
    """Two models on the same items."""

    a: Scores
    b: Scores
    differences: tuple[ScoreDifference, ...]

    def json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {"a": self.a.json(), "b": self.b.json(), "differences": [each.json() for each in self.differences]}

    def __rich__(self) -> "Page":
        from cramjax.evaluation.show import comparison

        return comparison(self)


def scores_of(measured: Measured, seed: int) -> tuple[Score, ...]:
    """The scores that measures give."""
    return tuple(Score(each.name, each.value, each.interval(seed)) for each in measured.measures)


def differences_of(task: str, a: Measured, b: Measured, seed: int) -> list[ScoreDifference]:
    """How two models differ in the measures that mean the same for both.

    Per token, only models that cut a text into equally many tokens are compared.
    """
    theirs = {each.name: each for each in b.measures}
    pairs = [(own, theirs[own.name]) for own in a.measures]
    return [_difference(task, *pair, seed) for pair in pairs if (pair[0].below == pair[1].below).all()]


def _difference(task: str, a: Measure, b: Measure, seed: int) -> ScoreDifference:
    more, interval = a.difference(b, seed)
    return ScoreDifference(task, a.name, a.value, b.value, more, interval, a.higher_is_better)


def _ends(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else ends(interval)
