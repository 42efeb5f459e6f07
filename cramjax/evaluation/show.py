"""Scores for the eye: a table of them, what to keep in mind, and for two models the verdict of each number."""

from collections.abc import Sequence

from rich.text import Text

from cramjax.evaluation.bootstrap import RESAMPLES
from cramjax.evaluation.results import Score, ScoreComparison, ScoreDifference, Scores, TaskScores
from cramjax.show.numbers import Interval, span
from cramjax.show.tables import Grid, Page, warning


def scores(made: Scores) -> Page:
    """What a model reached."""
    rows = [row for task in made.tasks for row in _rows(task)]
    columns = ("task", "score", "value", "95% interval", "items")
    return Page(
        [
            f"{made.model}. Intervals: bootstrap over items, {RESAMPLES:,} resamples, seed {made.seed}",
            Grid("", columns, rows, left=("score",)),
            *_notes(made.tasks),
        ]
    )


def comparison(made: ScoreComparison) -> Page:
    """How two models differ."""
    columns = ("task", "score", "A", "B", "B − A", "95% interval", "items", "verdict")
    return Page(
        [
            f"A: {made.a.model}. B: {made.b.model}. Both on the same items; intervals: paired bootstrap over items, "
            f"{RESAMPLES:,} resamples, seed {made.a.seed}",
            Grid("", columns, _compared(made), left=("score", "verdict")),
            *_notes(made.a.tasks, "A: "),
            *_notes(made.b.tasks, "B: "),
        ]
    )


def _rows(task: TaskScores) -> list[tuple[str, ...]]:
    return [
        (
            task.task if place == 0 else "",
            score.name,
            _value(score),
            _span(score.interval),
            f"{task.items:,}" if place == 0 else "",
        )
        for place, score in enumerate(task.scores)
    ]


def _compared(made: ScoreComparison) -> list[tuple[str, ...]]:
    rows, before = [], ""
    for each in made.differences:
        first = each.task != before
        before = each.task
        rows.append(_difference(each, f"{made.a[each.task].items:,}", first))
    return rows


def _difference(each: ScoreDifference, items: str, first: bool) -> tuple[str, ...]:
    return (
        each.task if first else "",
        each.name,
        f"{each.a:.4f}",
        f"{each.b:.4f}",
        f"{each.difference:+.4f}",
        _span(each.interval),
        items if first else "",
        each.verdict,
    )


def _value(score: Score) -> str:
    return f"{score.value:.4f}" if abs(score.value) < 1000 else f"{score.value:,.0f}"


def _span(interval: Interval | None) -> str:
    return (
        "" if interval is None else f"{interval[0]:.4f} … {interval[1]:.4f}" if interval[1] < 1000 else span(interval)
    )


def _notes(tasks: Sequence[TaskScores], side: str = "") -> list[Text]:
    return [warning(f"{side}{task.task}: {note}.") for task in tasks for note in task.notes]
