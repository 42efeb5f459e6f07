"""What may be spent, and the one clock that says how much of it is.

Schedules, batch ramps, evaluation points, checkpoints and the stop all read the clock's fraction, and nothing else.
"""

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from cramjax.errors import ConfigError

Unit = Literal["seconds", "tokens", "flops", "steps"]

_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]+)?\s*", re.IGNORECASE)
_ALLOWED = "a time (90s, 10min, 24h, 1d), tokens (300Mtok), FLOPs (1.5e18flop) or steps (500steps)"


@dataclass(frozen=True)
class Budget:
    """An amount of one resource: seconds, tokens, FLOPs or optimizer steps."""

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read a budget such as `24h`, `10min`, `300Mtok`, `1.5e18flop` or `500steps`.

        Raises:
            ConfigError: the text has no unit, an unknown one, or an amount that is not positive.
        """
        match = _PATTERN.fullmatch(str(text))
        if match is None:
            raise ConfigError(f"budget must be a number and a unit, got {text!r}: give {_ALLOWED}.")
        amount, suffix = float(match[1]), (match[2] or "").lower()
        if not suffix:
            raise ConfigError(f"budget {text!r} has no unit: give {_ALLOWED}.")
        if amount <= 0 or amount == float("inf"):
            raise ConfigError(f"budget must be positive and finite, got {text!r}: give {_ALLOWED}.")
        if suffix in _SECONDS:
            return cls(amount * _SECONDS[suffix], "seconds")
        resources: tuple[tuple[str, Unit], ...] = (
            (r"tok(?:en)?s?", "tokens"),
            (r"flops?", "flops"),
            (r"steps?", "steps"),
        )
        for name, unit in resources:
            scaled = re.fullmatch(f"([kmgbtpe]?){name}", suffix)
            if scaled:
                return cls(amount * _SCALES[scaled[1]], unit)
        raise ConfigError(f"budget {text!r} has the unknown unit {match[2]!r}: give {_ALLOWED}.")

    def __str__(self) -> str:
        if self.unit == "seconds":
            for name, scale in (("h", 3600.0), ("min", 60.0)):
                if self.amount >= scale and self.amount % scale == 0:
                    return f"{self.amount / scale:g}{name}"
            return f"{self.amount:g}s"
        return f"{self.amount:g} {'FLOPs' if self.unit == 'flops' else self.unit}"


@dataclass(frozen=True)
class Spent:
    """What a run has used so far."""

    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    steps: int = 0

    def to_dict(self) -> dict[str, float]:
        """The four amounts by name, for a checkpoint."""
        return asdict(self)


class Clock:
    """Counts what a run spends against its budget; it runs between `start` and `pause`.

    Args:
        budget: what may be spent.
        spent: what an earlier part of the run has spent already (from its checkpoint).
        now: source of monotonic seconds.
    """

    def __init__(self, budget: Budget, spent: Spent | None = None, now: Callable[[], float] = time.monotonic):
        self.budget = budget
        self._spent = spent or Spent()
        self._now = now
        self._since: float | None = None

    def start(self) -> None:
        """Let seconds count from here on."""
        if self._since is None:
            self._since = self._now()

    def pause(self) -> None:
        """Stop counting seconds until the next `start`."""
        self._spent = self.spent
        self._since = None

    @property
    def spent(self) -> Spent:
        """What has been spent up to this moment."""
        running = 0.0 if self._since is None else self._now() - self._since
        return Spent(self._spent.seconds + running, self._spent.tokens, self._spent.flops, self._spent.steps)

    def record_step(self, tokens: int, flops: float) -> None:
        """Count one optimizer step over `tokens` tokens."""
        old = self._spent
        self._spent = Spent(old.seconds, old.tokens + tokens, old.flops + flops, old.steps + 1)

    def fraction(self) -> float:
        """The share of the budget that is spent, in [0, 1]."""
        return min(1.0, getattr(self.spent, self.budget.unit) / self.budget.amount)

    def fraction_after(self, cost: Spent, pending_seconds: float = 0.0, longest_seconds: float = 0.0) -> float:
        """The share that will be spent when a step now being planned has ended, in [0, 1].

        It is exactly 1 for the last step, which so runs at the schedule's final value. Tokens, FLOPs and steps are
        known beforehand: the last step is the one after which less than half of another would fit. Seconds are not:
        it is the first step that would overrun the budget if it took as long as the longest of late. However speed
        varies, a run whose steps last at most that long then ends within one such step of its budget, either way.

        Args:
            cost: what the step is expected to use.
            pending_seconds: predicted time that steps already dispatched still need.
            longest_seconds: what a step like the longest of late would take.
        """
        unit = self.budget.unit
        spent, step = getattr(self.spent, unit), getattr(cost, unit)
        if unit == "seconds":
            spent += pending_seconds
            reserve = max(step, longest_seconds)
        else:
            reserve = 1.5 * step
        return 1.0 if spent + reserve > self.budget.amount else (spent + step) / self.budget.amount

    def seconds_left(self) -> float:
        """Seconds of a time budget that are not spent; infinite for other budgets."""
        return self.budget.amount - self.spent.seconds if self.budget.unit == "seconds" else float("inf")
