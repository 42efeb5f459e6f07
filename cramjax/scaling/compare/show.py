"""A comparison for the eye: each seed's scores, failures and caveats, what differs, and last the verdict."""

from rich.text import Text

from cramjax.scaling.compare.comparison import Comparison, Outcome, Pair, signed
from cramjax.show.tables import Grid, Page, warning

_COLUMNS = ("seed", "A", "B", "B − A", "tokens A", "tokens B", "seconds A", "seconds B")


def comparison(made: Comparison) -> Page:
    """A comparison that ends with its verdict."""
    score = made.measure.words + (" at the masked loss" if made.objective == "masked" else "")
    return Page(
        [
            f"A: {made.a}. B: {made.b}. Budget {made.budget}, held-out {score}",
            Grid("", _COLUMNS, [_row(pair) for pair in made.pairs], plain=True),
            *map(warning, made.notes),
            *(f"{key}: {a} → {b}" for key, (a, b) in made.differing.items()),
            Text(made.verdict, "bold"),
        ]
    )


def _row(pair: Pair) -> tuple[str, ...]:
    sides = (pair.a, pair.b)
    return (
        str(pair.seed),
        *map(_score, sides),
        "" if pair.difference is None else signed(pair.difference),
        *(_figure(outcome, "tokens") for outcome in sides),
        *(_figure(outcome, "seconds") for outcome in sides),
    )


def _score(outcome: Outcome | None) -> str:
    if outcome is None:
        return "…"
    return "failed" if outcome.score is None else f"{outcome.score:.4f}"


def _figure(outcome: Outcome | None, name: str) -> str:
    value = None if outcome is None else getattr(outcome, name)
    return "" if value is None else f"{value:,.1f}" if name == "seconds" else f"{value:,}"
