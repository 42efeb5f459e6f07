"""The training loop: step N is dispatched, then the metrics of step N-1 are read, so the device never waits."""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Sequence
from pathlib import Path

from cramjax.config import RunConfig
from cramjax.errors import ConfigError, DataError, ModelError, OutOfMemoryError, RunError, RunInterruptedError
from cramjax.optim import batch_size_at
from cramjax.training.checkpoint import newest_intact
from cramjax.training.continuing import continued, require_model
from cramjax.training.display import Display, QuietDisplay
from cramjax.training.lock import clear, is_empty, locked
from cramjax.training.methods import method_of
from cramjax.training.metrics import read_records
from cramjax.training.opening import Opened, open_run
from cramjax.training.parts import resolved
from cramjax.training.run import Run, read_config
from cramjax.training.session import Dispatched, Session
from cramjax.training.signals import Signals, catch_signals
from cramjax.validation import validate

_NOT_YET = math.nextafter(1.0, 0.0)
"""The fraction of a run whose last step was undone."""


def train(config: RunConfig, out: str | Path, *, display: Display | None = None) -> Run:
    """Train a model on a budget, in a new run directory.

    Args:
        config: the whole run.
        out: the run directory; it must not exist, or be empty.
        display: shows progress; default: nothing.

    Returns:
        The run, with the weights of its last step.

    Raises:
        UserError: the configuration, the data or the directory cannot be used, the budget is too small for one step,
            training stopped being finite, or a checkpoint could not be saved.
        RunInterruptedError: SIGTERM or SIGINT arrived; the run has saved itself.
    """
    out = Path(out)
    validate(config)
    require_model(config)
    config = continued(config)
    _require_new(out)
    with locked(out):
        _require_new(out)
        try:
            return _run(config, out, None, display or QuietDisplay())
        except (ConfigError, DataError, ModelError):
            if all(record["kind"] == "event" for record in read_records(out)):
                clear(out)  # of what was given something cannot be used, and no step has come of it
            raise


def resume(path: str | Path, *, budget: str | None = None, display: Display | None = None) -> Run:
    """Continue a run from its newest intact checkpoint, or from its start if it has none.

    Args:
        path: the run directory.
        budget: a new budget for the whole run, what is spent included; default: the run's own.
        display: shows progress; default: nothing.

    Returns:
        The run, with the weights of its last step.

    Raises:
        UserError: as for `train`; also when the run has spent its budget, or its vocabulary has changed.
        RunInterruptedError: SIGTERM or SIGINT arrived; the run has saved itself.
    """
    path, display = Path(path), display or QuietDisplay()
    config = read_config(path)
    if budget is not None:
        config = dataclasses.replace(config, budget=budget)
        validate(config)
    with locked(path):
        damaged: list[str] = []
        newest = newest_intact(path / "checkpoints", damaged.append)
        if damaged and newest is None:
            damaged.append("no checkpoint is intact: training again from the start.")
        return _run(config, path, newest, display, damaged)


def _require_new(out: Path) -> None:
    if out.exists() and not (out.is_dir() and is_empty(out)):
        raise RunError(f"{out} exists already: choose another --out, or continue it with --resume {out}.")


def _run(
    config: RunConfig, out: Path, resumed_from: Path | None, display: Display, warnings: Sequence[str] = ()
) -> Run:
    config, said, lost = resolved(config), [("checkpoint", warning) for warning in warnings], 0.0
    while True:
        opened = open_run(config, out, resumed_from, display.message, lost)
        try:
            return _spend(opened, display, said)
        except OutOfMemoryError:
            smaller = None if resumed_from or config.train.memory != "auto" else _halved(config, opened.parts.mesh.size)
            if smaller is None:
                raise
        before, after = opened.parts.microbatch, smaller.batch.microbatch
        opened.clock.pause()
        config, lost = smaller, opened.clock.spent.seconds
        what = f"out of memory at the first step with microbatches of {before}: starting again with {after}."
        said = [("memory", what)]


def _spend(opened: Opened, display: Display, said: Sequence[tuple[str, str]]) -> Run:
    with (
        display,
        catch_signals() as signals,
        contextlib.closing(Session(opened, display, said)) as session,
    ):
        spend_budget(session, signals)
        return session.finish()


def _halved(config: RunConfig, devices: int) -> RunConfig | None:
    """A configuration with the largest microbatch of at most half the size; None where there is none."""
    size = config.batch.size
    if not method_of(config).accumulates:
        return None
    microbatch = config.batch.microbatch or size
    smaller = (n for n in range(microbatch // 2, 0, -1) if size % n == 0 and n % devices == 0)
    half = next(smaller, None)
    return (
        None if half is None else dataclasses.replace(config, batch=dataclasses.replace(config.batch, microbatch=half))
    )


def spend_budget(session: Session, signals: Signals) -> None:
    """Step until the budget is spent; every decision is taken on the fraction of it that is.

    Args:
        session: the run.
        signals: tells when to save and leave.

    Raises:
        UserError: training stopped being finite, or a checkpoint could not be saved.
        RunInterruptedError: a signal arrived; the run has saved itself.
    """
    config, clock, meter = session.config, session.clock, session.meter
    in_flight: Dispatched | None = None
    forecast_made = log_due = False
    last = session.final_fraction

    while last < 1.0:
        microbatches = batch_size_at(config.batch, clock.fraction()) // session.parts.microbatch
        longest = meter.longest_seconds(microbatches)
        if in_flight and clock.seconds_left() < 3 * longest:
            # Which step is the last is decided on a measured moment, with nothing left to predict but that step.
            settled, in_flight = session.settle(in_flight), None
            if not settled:
                last = min(last, _NOT_YET)
                continue
        pending_seconds = meter.cost(in_flight.microbatches).seconds if in_flight else 0.0
        fraction = clock.fraction_after(meter.cost(microbatches), pending_seconds, longest)
        finished, in_flight = in_flight, session.dispatch(microbatches, fraction)

        due = _Due(last, fraction)
        last = fraction
        if finished and not session.settle(finished):
            in_flight, last = None, min(last, _NOT_YET)  # it started from the state that was given up
            continue
        if not forecast_made and meter.can_forecast:
            session.announce_forecast()
            forecast_made = True
        log_due = log_due or due(config.train.log_points)
        if log_due and meter.has_window:  # of the first step after a start nothing is known yet
            session.log_progress(fraction, microbatches)
            log_due = False

        ending, stopping = fraction == 1.0, signals.received is not None
        fits = clock.seconds_left() > session.longest_pause + 3 * longest and not ending
        evaluating = due(config.evaluate.points) and fits and not stopping
        saving = (due(config.checkpoint.points) or session.save_is_overdue()) and fits or stopping or ending
        if not (evaluating or saving):
            continue
        settled, in_flight = session.settle(in_flight), None
        if not settled:
            last = min(last, _NOT_YET)
        if settled and saving:  # first of all: what comes after may fail, or be killed
            if ending:
                clock.pause()
            session.save()
        if stopping:
            session.wait_for_save()
            raise _interrupted(session, signals.received)
        if settled and evaluating:
            score = session.evaluate(fraction, config.evaluate.tokens).score
            if saving:
                session.score_checkpoint(score)


def _interrupted(session: Session, number: int | None) -> RunInterruptedError:
    name = signal.Signals(number or 0).name
    verb = "train" if session.config.objective.kind in ("causal", "masked") else "tune"
    return RunInterruptedError(
        f"{name}: saved after {session.clock.fraction():.1%} of the budget. Continue with: "
        f"cramjax {verb} --resume {session.out}",
        number or 0,
    )


@dataclasses.dataclass(frozen=True)
class _Due:
    """Whether a step takes the spent fraction past one of so many evenly spaced points."""

    last: float
    fraction: float

    def __call__(self, points: int) -> bool:
        return int(self.fraction * points) > int(self.last * points)
