"""What the protocol came to: a score of each task and seed, medians, their average, and what was published."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from statistics import fmean, median
from typing import Any

from cramjax.evaluation.results import Score
from cramjax.glue.protocol import ENTRIES, PUBLISHED
from cramjax.show.numbers import ends
from cramjax.show.tables import Grid, Page, warning
from cramjax.show.values import Viewed


@dataclass(frozen=True)
class SeedScores:
    """What one seed reached in a task."""

    seed: int
    scores: Mapping[str, Score]
    """By the name of the entry (MNLI has two)."""
    steps: int
    seconds: float
    """Of training."""


@dataclass(frozen=True)
class TaskResult:
    """One score of the protocol over the seeds."""

    entry: str
    metric: str
    items: int
    seeds: tuple[int, ...]
    scores: tuple[Score, ...]
    """Of each seed; its interval is over rows."""

    @cached_property
    def median(self) -> float:
        """Over the seeds."""
        return median(score.value for score in self.scores)


@dataclass(frozen=True, repr=False)
class Tuned(Viewed):
    """A model by the protocol."""

    model: str
    glue: bool
    """Whether the tasks are GLUE's."""
    results: tuple[TaskResult, ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def __getitem__(self, entry: str) -> TaskResult:
        """The result of an entry."""
        return next(result for result in self.results if result.entry == entry)

    @property
    def average(self) -> float:
        """Mean of the medians."""
        return fmean(result.median for result in self.results)

    @property
    def complete(self) -> bool:
        """Whether these are all nine of GLUE's numbers, so that the average is what others report."""
        return self.glue and {result.entry for result in self.results} == set(ENTRIES)

    def json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "cramjax": version("cramjax"),
            "model": self.model,
            "tasks_of": "GLUE" if self.glue else "others; not GLUE",
            "average_of_medians": self.average,
            "complete": self.complete,
            "settings": dict(self.settings),
            "results": {
                result.entry: {
                    "metric": result.metric,
                    "items": result.items,
                    "median": result.median,
                    "seeds": {
                        str(seed): {
                            "value": score.value,
                            "interval": None if score.interval is None else ends(score.interval),
                        }
                        for seed, score in zip(result.seeds, result.scores, strict=True)
                    },
                }
                for result in self.results
            },
            "notes": list(self.notes),
            "published_not_measured_here": (
                {name: dict(zip(ENTRIES, values, strict=True)) for name, values in PUBLISHED.items()}
                if self.glue
                else {}
            ),
        }

    def __rich__(self) -> Page:
        rows = [
            (
                result.entry,
                result.metric,
                f"{100 * result.median:.1f}",
                f"{100 * min(s.value for s in result.scores):.1f} … {100 * max(s.value for s in result.scores):.1f}",
                _middle(result),
                f"{len(result.scores)}",
                f"{result.items:,}",
            )
            for result in self.results
        ]
        count = f"the {len(self.results)} numbers" + ("" if not self.glue or self.complete else " of GLUE's nine")
        rows.append((f"average of {count}", "", f"{100 * self.average:.1f}", "", "", "", ""))
        what = "GLUE's development sets" if self.glue else "not GLUE: other tasks by the same protocol"
        columns = ("task", "score", "median", "over seeds", "95% over rows", "seeds", "rows")
        parts: list[Any] = [
            f"{self.model}: Cramming's protocol ({what}), scores times 100",
            Grid("", columns, rows, left=("score",)),
        ]
        if self.glue:
            shown = [result.entry for result in self.results]
            published = [
                (name, *(f"{values[ENTRIES.index(entry)]:.1f}" for entry in shown),
                 f"{fmean(values[ENTRIES.index(entry)] for entry in shown):.1f}")
                for name, values in PUBLISHED.items()
            ]  # fmt: skip
            title = "Published (Geiping & Goldstein 2022), not measured here"
            parts.append(Grid(title, ("model", *shown, "average"), published))
        return Page([*parts, *(warning(note) for note in self.notes)])


def _middle(result: TaskResult) -> str:
    """The interval of the seed nearest to the median."""
    nearest = min(result.scores, key=lambda score: abs(score.value - result.median))
    if nearest.interval is None:
        return ""
    return f"{100 * nearest.interval[0]:.1f} … {100 * nearest.interval[1]:.1f}"
