"""The result of comparing two recipes: scores of each seed, the difference B − A, and the verdict in words.

`cramjax.scaling.compare.run` makes it from finished runs; here it is judged and written as JSON.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cramjax.scaling.compare.paired import PairedDifference, paired_difference
from cramjax.show.values import Viewed

if TYPE_CHECKING:
    from cramjax.show.figures import Plot
    from cramjax.show.tables import Page

Side = Literal["a", "b"]


@dataclass(frozen=True)
class Measure:
    """What runs are compared by."""

    name: str
    """In the log and the summary of a run."""
    words: str
    """For the eye."""
    more_is_better: bool = False


BITS = Measure("bits_per_byte", "bits per byte")
ACCURACY = Measure("accuracy", "accuracy", more_is_better=True)
SQUARED_ERROR = Measure("loss", "mean squared error")


@dataclass(frozen=True)
class Outcome:
    """What one run came to: its score, or why it has none."""

    score: float | None = None
    """Of all that is held out, at the end of the budget, by the comparison's measure."""
    tokens: int | None = None
    steps: int | None = None
    seconds: float | None = None
    """Spent in training."""
    failure: str | None = None
    measure: str = BITS.words
    """What the score is."""

    def __str__(self) -> str:
        if self.failure is not None:
            return f"failed: {self.failure}"
        return f"{self.score:.4f} {self.measure}, {self.tokens:,} tokens in {self.seconds:.1f} s"


@dataclass(frozen=True)
class Pair:
    """The two runs of one seed; None: not run yet."""

    seed: int
    a: Outcome | None
    b: Outcome | None

    @property
    def difference(self) -> float | None:
        """B's score less A's; None unless both runs finished."""
        if self.a is None or self.b is None or self.a.score is None or self.b.score is None:
            return None
        return self.b.score - self.a.score


@dataclass(frozen=True, repr=False)
class Comparison(Viewed):
    """Two recipes on one budget, the same seeds for both."""

    a: str
    """What A is called."""
    b: str
    budget: str
    objective: str
    differing: Mapping[str, tuple[Any, Any]]
    """Values in A and in B of each field in which they differ."""
    pairs: tuple[Pair, ...]
    path: Path
    """Its directory: `seed-N/a` and `seed-N/b` are the run directories."""
    held_out: Mapping[str, Any]
    """Bytes and SHA-256 of the text that both were scored on."""
    measure: Measure = BITS
    warnings: tuple[str, ...] = ()
    interrupted_by: int | None = None
    """The signal that stopped it."""

    @cached_property
    def difference(self) -> PairedDifference | None:
        """B − A of the scores over the pairs that finished; None while there is none."""
        found = [pair.difference for pair in self.pairs if pair.difference is not None]
        return paired_difference(found) if found else None

    @property
    def verdict(self) -> str:
        """What the pairs say, in a sentence."""
        found = self.difference
        if found is None:
            return "nothing to compare: no pair has two finished runs."
        if found.interval is None:
            return (
                f"one pair: B − A is {signed(found.mean)} {self.measure.words}. One pair has no interval: "
                "give --seeds 2 or more."
            )
        digits = _digits(found)
        low, high = (signed(end, digits) for end in found.interval)
        what = (
            f"B − A is {signed(found.mean, digits)} {self.measure.words} (95% interval {low} to {high}, "
            f"{found.pairs} pairs)"
        )
        if found.settled:
            return f"{'B' if (found.mean > 0) == self.measure.more_is_better else 'A'} is better: {what}"
        if found.mean == 0:
            return f"not settled: {what}; no number of pairs would settle a mean of 0"
        if found.pairs_to_settle is None:
            return f"not settled: {what}; no reasonable number of pairs would settle a difference of this size"
        return f"not settled: {what}; about {found.pairs_to_settle:,} pairs would settle a difference of this size"

    @property
    def notes(self) -> list[str]:
        """Failures, pairs still to run, and what to keep in mind."""
        failed = [
            f"seed {pair.seed}, {side.upper()} failed, so the pair does not count: {outcome.failure} (to run it again, "
            f"remove {self.path / f'seed-{pair.seed}' / side})"
            for pair in self.pairs
            for side, outcome in (("a", pair.a), ("b", pair.b))
            if outcome is not None and outcome.failure is not None
        ]
        left = sum(outcome is None for pair in self.pairs for outcome in (pair.a, pair.b))
        to_do = [f"{left} of {2 * len(self.pairs)} runs are still to be done."] if left else []
        return [*self.warnings, *failed, *to_do]

    def json(self) -> dict[str, Any]:
        """Everything as plain values."""
        found = self.difference
        return {
            "a": self.a,
            "b": self.b,
            "budget": self.budget,
            "objective": self.objective,
            "measure": self.measure.name,
            "differing": {key: list(values) for key, values in self.differing.items()},
            "held_out": dict(self.held_out),
            "pairs": [
                {
                    "seed": pair.seed,
                    "a": None if pair.a is None else asdict(pair.a),
                    "b": None if pair.b is None else asdict(pair.b),
                    "difference": pair.difference,
                }
                for pair in self.pairs
            ],
            "pairs_counted": 0 if found is None else found.pairs,
            "mean": None if found is None else found.mean,
            "std": None if found is None else found.std,
            "interval": None if found is None or found.interval is None else list(found.interval),
            "seeds_to_settle": None if found is None else found.pairs_to_settle,
            "settled": found is not None and found.settled,
            "verdict": self.verdict,
            "notes": self.notes,
        }

    def plot(self) -> "Plot":
        """The difference of each seed with the mean's interval, and mean curves over the budget."""
        from cramjax.scaling.compare.plots import overview  # here, because matplotlib is slow to import

        return overview(self)

    def __rich__(self) -> "Page":
        from cramjax.scaling.compare.show import comparison

        return comparison(self)


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign, typeset: `+0.0123`, `−0.0123`."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _digits(found: PairedDifference) -> int:
    """Decimals that show two digits of the interval's half width: four at least, nine at most."""
    assert found.interval is not None
    width = (found.interval[1] - found.interval[0]) / 2
    return 4 if width == 0 else min(max(4, 1 - math.floor(math.log10(width))), 9)
