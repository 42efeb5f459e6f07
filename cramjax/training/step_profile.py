"""The trace of a profiled run, read back: what part of the model took the time of its steps, as a table and as bars."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.profiler import ProfileData

from cramjax.errors import RunError
from cramjax.show.tables import figures_html
from cramjax.training.profile import PLANE, phases_in_words, phases_of_a_step

if TYPE_CHECKING:
    from cramjax.show.figures import Plot


@dataclass(frozen=True, repr=False)
class StepProfile:
    """Where the time of the traced steps went.

    Attributes:
        seconds: of each part of the model, forward and backward, what it took itself: without the parts in it. Of all
            layers and of all threads together, so that two threads that work at the same time count twice. Empty for
            a GPU, in whose trace layers are not named.
        phases: of a step with its optimizer on the host, seconds that the host waited for each thing; empty for others
            (`cramjax.training.profile.phases_of_a_step`).
    """

    seconds: Mapping[str, float]
    phases: Mapping[str, float] = field(default_factory=dict)

    @property
    def shares(self) -> dict[str, float]:
        """The same as shares of all, the largest first."""
        return _shares(self.seconds)

    def plot(self) -> "Plot":
        """A bar for each part of the model, forward and backward; where none is named, for each phase."""
        from cramjax.training import plots  # here, because matplotlib is slow to import

        return plots.Plot(plots.parts_of_a_step(self.shares or _shares(self.phases)))

    def __str__(self) -> str:
        width = max(map(len, self.seconds), default=0)
        lines = [f"{part:{width}}  {share:6.1%}" for part, share in self.shares.items()]
        return "\n".join(filter(None, [*lines, phases_in_words(self.phases)]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        tables = {
            "share of the traced steps": [(part, f"{share:.1%}") for part, share in self.shares.items()],
            "seconds of a step, waiting for": [(name, f"{own:.3g}") for name, own in self.phases.items()],
        }
        return "".join(figures_html(caption, figures) for caption, figures in tables.items() if figures)


def read_step_profile(run: Path) -> StepProfile:
    """What the newest trace of a run directory says.

    Args:
        run: the directory of a run with `train.profile`.

    Raises:
        RunError: it has no trace, or one in which nothing is named (that of a GPU that updates its weights itself).
    """
    traces = sorted(run.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
    if not traces:
        raise RunError(f"{run} holds no trace: train with train.profile=true, for 13 steps or more.")
    plane = ProfileData.from_file(str(traces[-1])).find_plane_with_name(PLANE)
    seconds: dict[str, float] = {}
    for line in () if plane is None else plane.lines:
        for name, own in _own_times(line.events):
            part = re.sub(r"\blayer_\d+", "layer", name)
            seconds[part] = seconds.get(part, 0.0) + own / 1e9
    phases = phases_of_a_step(traces[-1])
    if not seconds and not phases:
        raise RunError(f"no layers are named in {traces[-1]}: look at it in TensorBoard, with xprof.")
    return StepProfile(seconds, phases)


def _shares(seconds: Mapping[str, float]) -> dict[str, float]:
    total = sum(seconds.values())
    return {part: own / total for part, own in sorted(seconds.items(), key=lambda part: -part[1])}


def _own_times(events: Iterable[Any]) -> list[tuple[str, float]]:
    """Names and nanoseconds of a thread's events, each without those that lie in it."""
    found: list[list[Any]] = []
    open_: list[tuple[float, list[Any]]] = []
    for event in sorted(events, key=lambda event: (event.start_ns, -event.duration_ns)):
        end = event.start_ns + event.duration_ns
        while open_ and open_[-1][0] < end - 1:  # 1 ns: rounding
            open_.pop()
        if open_:
            open_[-1][1][1] -= event.duration_ns
        found.append([event.name, event.duration_ns])
        open_.append((end, found[-1]))
    return [(name, max(own, 0.0)) for name, own in found]
