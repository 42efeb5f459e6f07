"""When texts that wait become batches, for a loop that serves: as soon as the device is idle, or a little later.

The rules are TurboTransformers' (Fang et al. 2020, section 5): a hungry one for servers whose queue is never empty, a
lazy one where the first of few texts is worth holding back for the company of others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Trigger(Protocol):
    """Says how long an idle device is left idle."""

    def wait(self, arrivals: Sequence[float], now: float) -> float:
        """Seconds until what waits is to be computed: 0: now; infinity: nothing waits.

        Args:
            arrivals: when each text came that waits, in seconds of one clock, the first first.
            now: by the same clock.
        """
        ...


@dataclass(frozen=True)
class Hungry:
    """At once."""

    def wait(self, arrivals: Sequence[float], now: float) -> float:
        """See `Trigger`."""
        del now
        return 0.0 if arrivals else math.inf


@dataclass(frozen=True)
class Lazy:
    """When the first has waited for some time, or enough wait."""

    patience: float
    """Seconds that a text waits at most, while the device is idle."""
    enough: int = 32
    """Texts that wait for no more."""

    def wait(self, arrivals: Sequence[float], now: float) -> float:
        """See `Trigger`."""
        if not arrivals:
            return math.inf
        return 0.0 if len(arrivals) >= self.enough else max(0.0, arrivals[0] + self.patience - now)
