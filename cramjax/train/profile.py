"""A trace of a few steps, for TensorBoard's profile plugin (XProf): which operation of which layer took how long."""

from pathlib import Path

import jax

_FIRST, _STEPS = 5, 8
"""Steps before the trace (they still warm up), and steps in it."""


class Profiler:
    """Traces some steps of a run, early on.

    Args:
        directory: the run directory: `tensorboard --logdir` of it shows the trace.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._settled = 0
        self._tracing = False

    def step_settled(self) -> str | None:
        """Count a step; start or stop the trace where it is time. Returns a sentence when the trace is written."""
        self._settled += 1
        if self._settled == _FIRST:
            jax.profiler.start_trace(str(self._directory))
            self._tracing = True
        elif self._settled == _FIRST + _STEPS:
            return self.stop()
        return None

    def stop(self) -> str | None:
        """Stop the trace, if one is running, and say where it is."""
        if not self._tracing:
            return None
        self._tracing = False
        jax.profiler.stop_trace()
        return (
            f"profile of {self._settled - _FIRST} steps written: tensorboard --logdir {self._directory} "
            "(its Profile tab needs `pip install xprof`)."
        )
