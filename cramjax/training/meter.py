"""Measures the loop: seconds per microbatch, tokens per second, utilisation, and means since the last log line."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from cramjax.budget import Budget, Spent

_RECENT = 16  # steps whose longest says what a step may take


class Meter:
    """Turns the moments at which steps end into speeds and averages.

    Args:
        microbatch_tokens: training tokens in one microbatch.
        flops_per_token: model FLOPs, forward and backward.
        peak_flops: peak FLOP/s of all devices together, where known.
        bytes_per_token: bytes of training text per token; None where no text is predicted, or answers as a whole.
        now: source of monotonic seconds.
    """

    def __init__(
        self,
        microbatch_tokens: int,
        flops_per_token: float,
        peak_flops: float | None,
        bytes_per_token: float | None,
        now: Callable[[], float] = time.monotonic,
    ):
        self._microbatch_tokens = microbatch_tokens
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._bytes_per_token = bytes_per_token
        self._now = now
        self._mark = now()
        self._per_microbatch = 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.steps = 0
        self.seconds = 0.0
        self.tokens = 0
        self._since = (0, 0.0, 0)
        self._losses: list[float] = []

    def mark(self) -> None:
        """Start timing the next step here: call after anything that was not a step."""
        self._mark = self._now()

    def step_ended(self, microbatches: int, loss: float) -> None:
        """Take in a step that has just ended."""
        now = self._now()
        seconds, self._mark = now - self._mark, now
        each = seconds / microbatches
        # A short memory, so that the estimate follows a machine that slows down; noise of one step is damped.
        self._per_microbatch = each if not self.steps else 0.7 * self._per_microbatch + 0.3 * each
        self._recent.append(each)
        self.steps += 1
        self.seconds += seconds
        self.tokens += microbatches * self._microbatch_tokens
        self._losses.append(loss)

    def cost(self, microbatches: int) -> Spent:
        """What a step of so many microbatches is expected to use, at the present speed."""
        tokens = microbatches * self._microbatch_tokens
        return Spent(microbatches * self._per_microbatch, tokens, tokens * self._flops_per_token, 1)

    def longest_seconds(self, microbatches: int) -> float:
        """What a step of so many microbatches would take at the lowest speed of the last sixteen steps."""
        return microbatches * max(self._recent, default=0.0)

    def speed(self, tokens: int, seconds: float) -> dict[str, float | None]:
        """Tokens per second, and the share of the devices' peak that their model FLOPs are."""
        if seconds <= 0:
            return {"tokens_per_second": None, "mfu": None}
        flops = tokens * self._flops_per_token / seconds
        return {
            "tokens_per_second": tokens / seconds,
            "mfu": flops / self._peak_flops if self._peak_flops else None,
        }

    @property
    def can_forecast(self) -> bool:
        """Whether enough steps were timed to say what a budget buys."""
        return self.steps >= 5 and self.seconds >= 1.0

    @property
    def has_window(self) -> bool:
        """Whether a step has ended since `take_window` was last called."""
        return bool(self._losses)

    def take_window(self) -> dict[str, Any]:
        """Mean loss and speed since this was last called; a step must have ended since."""
        steps, seconds, tokens = self._since
        self._since = (self.steps, self.seconds, self.tokens)
        loss = sum(self._losses) / len(self._losses)
        self._losses.clear()
        return {
            "loss": loss,
            "bits_per_byte": loss / math.log(2) / self._bytes_per_token if self._bytes_per_token else None,
            **self.speed(self.tokens - tokens, self.seconds - seconds),
        }

    def forecast(self, budget: Budget, spent: Spent, microbatches: int, tokens_per_epoch: int) -> tuple[str, float]:
        """What the whole budget will buy at the speed so far: a sentence, and the number of epochs.

        Args:
            budget: the budget.
            spent: what is spent.
            microbatches: microbatches in a step at the end of the batch ramp.
            tokens_per_epoch: training tokens in the data.
        """
        step = self.cost(microbatches)
        steps = (budget.amount - getattr(spent, budget.unit)) / getattr(step, budget.unit)
        tokens = spent.tokens + steps * step.tokens
        epochs = tokens / tokens_per_epoch
        seconds = spent.seconds + steps * step.seconds
        return (
            f"a budget of {budget} buys about {tokens:.3g} tokens: {spent.steps + steps:,.0f} steps, {epochs:.2g} epochs, "  # noqa: E501
            f"{tokens * self._flops_per_token:.2g} FLOPs, {seconds / 60:.3g} minutes",
            epochs,
        )
