"""A run in progress: what lives and changes while a budget is spent, and the acts the loop is made of."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from cramjax import devices
from cramjax.cache import write_atomically
from cramjax.compiling import time_budget
from cramjax.config import RunConfig
from cramjax.data import Prefetcher
from cramjax.data.examples import ExampleFile, LabelledFile, PreparedExamples
from cramjax.errors import OutOfMemoryError, RunError
from cramjax.formats.tokens import CHAT_TEMPLATE
from cramjax.optim import schedule
from cramjax.parallel import batch_sharding, on_mesh
from cramjax.recipes import to_yaml
from cramjax.start import start
from cramjax.training import checkpoint as checkpoints
from cramjax.training.based import base_identity, base_params
from cramjax.training.continuing import starting_params
from cramjax.training.display import Display
from cramjax.training.heldout import (
    Evaluation,
    HeldOut,
    HeldOutLabels,
    HeldOutPairs,
    HeldOutRows,
    LabelEvaluation,
    PairEvaluation,
)
from cramjax.training.methods import method_of, step_program
from cramjax.training.metrics import RunLog
from cramjax.training.opening import Opened
from cramjax.training.profile import Profiler
from cramjax.training.run import Run, config_text
from cramjax.training.step import Batch, State, StepMetrics

_MAX_ROLLBACKS = 3

_LONG_START = 0.1
"""Share of a time budget above which a run says how long its start took."""


@dataclass(frozen=True)
class Dispatched:
    """A step the device is working on."""

    number: int
    microbatches: int
    fraction: float
    metrics: StepMetrics


class Session:
    """A run between its first and its last step: made, its clock is running and its step is compiled.

    Args:
        opened: the run.
        display: shows progress.
        said: names and messages of events that led here.

    Raises:
        RunError: a time budget is over before the first step, or the checkpoint is of another configuration.
    """

    def __init__(self, opened: Opened, display: Display, said: Sequence[tuple[str, str]] = ()):
        self.opened, self.display = opened, display
        self.config, self.out, self.parts, self.data = opened.config, opened.out, opened.parts, opened.data
        self.clock, self.meter, self.final_fraction = opened.clock, opened.meter, opened.final_fraction
        meta, out, config, parts = opened.meta, opened.out, opened.config, opened.parts
        self.position, last_step = (0, 0) if meta is None else (meta.position, meta.step)
        self._last_save, self._saved_step = time.monotonic(), None if meta is None else meta.step
        self._rollbacks, self.longest_pause = 0, 0.0
        self._base = base_identity(config)
        _write_what_is_known(opened)
        with contextlib.ExitStack() as resources:
            self.log = RunLog(out, last_step)
            resources.callback(self.log.close)
            self._profiler = Profiler(out, lambda: self.step_function.as_text() or "") if config.train.profile else None
            resources.callback(lambda: self._profiler and self._profiler.stop())
            self._writer = checkpoints.CheckpointWriter(out / "checkpoints", config.checkpoint.keep)
            resources.callback(self._writer.join)
            if self.log.damaged:
                self.announce("log", f"{self.log.damaged} damaged lines of metrics.jsonl are left out.")
            for name, message in [*([("data", str(self.data))] if meta is None else []), *said]:
                self.announce(name, message)
            if self.final_fraction < 1.0:  # a run that was killed after its last step owes only what is not charged
                self.clock.start()
            began = time.monotonic()
            self._prefetcher = Prefetcher(opened.sequences, self.position, parts.microbatch, config.train.prefetch)
            resources.callback(self._prefetcher.close)
            self.held_out = self._held_out()
            with self._memory_guarded():
                program = step_program(config, parts)
                self.step_function, self._like = program.step.compile(), program.like
                self._batch_like, compiled = program.batch.tokens, time.monotonic()
                if opened.resumed_from is None:
                    given = [starting_params(path, parts.model, config.seed)] if (path := config.start_from) else []
                    self.state: State = jax.block_until_ready(program.create(display.message, *given))
                else:
                    self.state = self._restored(opened.resumed_from)
            self._tell_how_long(compiled - began, time.monotonic() - compiled)
            if config.train.nonfinite == "rollback" and opened.resumed_from is None:
                self.save()
            self.meter.mark()
            for stale in ("summary.json", "report.html"):  # of a smaller budget, which has been restored
                (out / stale).unlink(missing_ok=True)
            self._resources = resources.pop_all()

    def dispatch(self, microbatches: int, fraction: float) -> Dispatched:
        """Hand the next step to the device without waiting for it.

        Args:
            microbatches: microbatches of the batch.
            fraction: share of the budget spent when the step has ended.
        """
        batch = self.next_batch(microbatches)
        with self._memory_guarded():
            self.state, metrics = self.step_function(self.state, batch, np.float32(fraction))
        cost = self.meter.cost(microbatches)
        self.clock.record_step(cost.tokens, cost.flops)
        self.final_fraction = fraction
        return Dispatched(self.clock.spent.steps, microbatches, fraction, metrics)

    @property
    def most_microbatches(self) -> int:
        """Microbatches in a step at the end of the batch ramp."""
        return self.config.batch.size // self.parts.microbatch

    def next_batch(self, microbatches: int) -> Batch:
        """The next sequences of the data order, on the devices."""
        tokens = np.zeros(self._batch_like.shape, np.int32)
        for index in range(microbatches):
            tokens[index] = next(self._prefetcher)
        self.position += microbatches * self.parts.microbatch
        count: Any = np.int32(microbatches)
        return Batch(jax.device_put(tokens, self._batch_like.sharding), count)

    def settle(self, step: Dispatched) -> bool:
        """Wait for a step and take in its metrics; False if the run was rolled back instead.

        Raises:
            RunError: the loss or the gradient is not finite, and the configuration says to stop.
        """
        with self._memory_guarded():
            metrics = jax.device_get(step.metrics)
        if not metrics.finite:
            self._not_finite(step, metrics)
            return False
        self.meter.step_ended(step.microbatches, float(metrics.loss))
        self.last_metrics = metrics
        if self._profiler and (message := self._profiler.step_settled()):
            self.announce("profile", message)
        return True

    def log_progress(self, fraction: float, microbatches: int) -> None:
        """Write one line of training metrics: means since the last one."""
        record = self.log.write(
            "train",
            **self._where(fraction),
            **self.meter.take_window(),
            lr=float(self.last_metrics.lr),
            grad_norm=float(self.last_metrics.grad_norm),
            batch_size=microbatches * self.parts.microbatch,
            memory_bytes=devices.memory_bytes(self.parts.mesh.devices.flat[0]),
        )
        self.display.record(record)

    def evaluate(self, fraction: float, max_tokens: int | None) -> Evaluation | LabelEvaluation | PairEvaluation:
        """Score the current weights on held-out text and log it; if that fails, they are saved first."""
        started = time.monotonic()
        try:
            evaluation = self.held_out.evaluate(self._weights(), max_tokens)
        except Exception:
            if self._saved_step != self.clock.spent.steps:
                self.save()
            raise
        self.display.record(self.log.write("evaluate", **self._where(fraction), **evaluation.scores()))
        self.longest_pause = max(self.longest_pause, time.monotonic() - started)
        self.meter.mark()
        return evaluation

    def save(self) -> None:
        """Start writing a checkpoint of this moment; no step may be in flight."""
        started = time.monotonic()
        self._writer.save(
            self._kept(self.state),
            checkpoints.Meta(
                step=self.clock.spent.steps,
                position=self.position,
                spent=asdict(self.clock.spent),
                config=to_yaml(self.config),
                tokenizer=self.opened.tokenizer_json,
                final_fraction=self.final_fraction,
                data=self.data.train.identity,
                base=self._base,
            ),
        )
        self._saved_step = self.clock.spent.steps
        self._last_save = time.monotonic()
        self.longest_pause = max(self.longest_pause, self._last_save - started)
        self.meter.mark()

    def score_checkpoint(self, score: float) -> None:
        """Give the checkpoint of this moment its score: bits per byte, or the loss of labels and of preferences."""
        self._writer.score(self.clock.spent.steps, score)

    def wait_for_save(self) -> None:
        """Wait until the checkpoint being written is complete."""
        self._writer.wait()

    def save_is_overdue(self) -> bool:
        """Whether the configured time between checkpoints has passed."""
        limit = self.config.checkpoint.seconds
        return limit is not None and time.monotonic() - self._last_save > limit

    def announce(self, event: str, message: str) -> None:
        """Show a sentence and keep it in the log."""
        self.log.write("event", **self._where(self.clock.fraction()), name=event, message=message)
        self.display.message(message)

    def announce_forecast(self) -> None:
        """Say what the budget will buy at the measured speed, and whether the data will repeat."""
        per_epoch = len(self.opened.sequences) * self.config.data.sequence_length
        sentence, epochs = self.meter.forecast(self.clock.budget, self.clock.spent, self.most_microbatches, per_epoch)
        self.announce("forecast", sentence)
        if epochs > 1:
            self.announce("repeats", f"the data will repeat: {per_epoch:.3g} tokens are read {epochs:.2g} times.")

    def finish(self) -> Run:
        """Score the last checkpoint, and all held-out text, and write `summary.json`; outside the budget.

        Returns:
            The run, with the weights that are in memory; its state is given up.
        """
        self.clock.pause()
        if self._profiler and (message := self._profiler.stop()):
            self.announce("profile", message)
        started = time.monotonic()
        subset = self.held_out.evaluate(self._weights(), self.config.evaluate.tokens)
        self.score_checkpoint(subset.score)
        self.wait_for_save()
        final = self.evaluate(self.final_fraction, None)
        spent, device = self.clock.spent, self.parts.mesh.devices.flat[0]
        timed = (self.meter.tokens, self.meter.seconds) if self.meter.steps else (spent.tokens, spent.seconds)
        summary = {
            **final.scores(),
            "budget": self.config.budget,
            "budget_spent": getattr(spent, self.clock.budget.unit),
            "budget_unit": self.clock.budget.unit,
            "final_fraction": self.final_fraction,
            "final_lr": self.config.optim.lr * float(schedule(self.config.optim)(self.final_fraction)),
            "tokens": spent.tokens,
            "epochs": self.position / len(self.opened.sequences),
            "steps": spent.steps,
            "flops": spent.flops,
            **self.meter.speed(*timed),
            "train_seconds": spent.seconds,
            "prepare_seconds": self.opened.prepare_seconds,
            "data": self.data.report["stages"],
            "finish_seconds": time.monotonic() - started,
            "params": self.parts.parameters,
            "device": devices.describe(device),
            "devices": self.parts.mesh.size,
            "memory_bytes": devices.memory_bytes(device),
        }
        write_atomically(self.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        params = jax.device_put(self._weights(), start()[0])
        del self.state
        return Run(self.out, self.config, self.data.tokenizer, self.parts.model, params, summary)

    def close(self) -> None:
        """Let go of threads and files, once the checkpoint being written is complete."""
        self._resources.close()

    @contextlib.contextmanager
    def _memory_guarded(self) -> Iterator[None]:
        """Until the first step has ended, tell running out of memory from other trouble."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or self.meter.steps:
                raise
            self._writer.join()
            self._writer.discard()  # of a start that took no step
            if self.opened.resumed_from is not None:  # a checkpoint fixes the batch
                advice = f"set train.remat=full in {self.out / 'config.yaml'}, or share the state by train.fsdp"
            else:
                advice = (
                    "give a smaller batch.microbatch (with lomo and adalomo: batch.size) or another train.remat, or "
                    "let train.memory=auto choose them"
                )
            raise OutOfMemoryError(
                f"the first step needs more memory than {devices.describe(self.parts.mesh.devices.flat[0])} has, with "
                f"microbatches of {self.parts.microbatch} and train.remat={self.config.train.remat}: {advice} "
                "(`cramjax plan` says what fits)."
            ) from error

    def _not_finite(self, step: Dispatched, metrics: StepMetrics) -> None:
        what = f"step {step.number}: loss {metrics.loss}, gradient norm {metrics.grad_norm}"
        self._writer.wait()
        last = checkpoints.newest_intact(self.out / "checkpoints", self.display.message)
        where = f"the last checkpoint is {last}" if last else "no checkpoint was written before it"
        if self.config.train.nonfinite == "stop" or last is None or self._rollbacks == _MAX_ROLLBACKS:
            again = f" after {self._rollbacks} rollbacks" if self._rollbacks else ""
            self.log.write("event", **self._where(step.fraction), name="nonfinite", message=what)
            raise RunError(
                f"training stopped being finite at {what}{again} ({where}). Lower optim.lr or optim.clip, or set "
                "train.nonfinite to rollback."
            )
        self._rollbacks += 1
        del self.state  # there may be no room for both
        self.state = self._restored(last)
        self.announce("rollback", f"not finite at {what}: back to {last.name}, skipping the batches since.")
        self.meter.mark()

    def _kept(self, state: State) -> State:
        """What a checkpoint holds of a state: without an adapter's base, which lies where the run started from."""
        return state if self.config.adapter is None else state._replace(frozen=())

    def _restored(self, checkpoint: Path) -> State:
        state = checkpoints.restore(checkpoint, self._kept(self._like))
        if self.config.adapter is None:
            return state
        frozen = base_params(self.config, self.parts.model)
        places = jax.tree.map(lambda like: like.sharding, self._like.frozen)
        return state._replace(frozen=jax.device_put(frozen, places))

    def _weights(self) -> PyTree:
        return method_of(self.config).evaluation_params(self.state, self.parts.optimizer)

    def _where(self, fraction: float) -> dict[str, float]:
        spent = self.clock.spent
        return {
            "step": spent.steps,
            "fraction": fraction,
            "seconds": spent.seconds,
            "tokens": spent.tokens,
            "flops": spent.flops,
        }

    def _held_out(self) -> HeldOut | HeldOutRows | HeldOutPairs | HeldOutLabels:
        mesh, config = self.parts.mesh, self.config
        rows = batch_sharding(mesh)
        loss_function, validation = on_mesh(mesh, self.parts.loss_function), self.data.validation
        options = {
            "batch": -(-config.evaluate.batch // mesh.size) * mesh.size,
            "put": lambda tokens: jax.device_put(tokens, rows),
            "seconds": time_budget(config.budget),
        }
        if isinstance(validation, ExampleFile):
            kind = HeldOutPairs if config.objective.kind == "preference" else HeldOutRows
            return kind(loss_function, validation, **options)
        if isinstance(validation, LabelledFile):
            return HeldOutLabels(loss_function, validation, **options)
        causal = config.objective.causal
        return HeldOut(loss_function, validation, config.data.sequence_length, causal=causal, **options)

    def _tell_how_long(self, compiling: float, state: float) -> None:
        """Say what helps a run whose start takes too much of its budget.

        Raises:
            RunError: it took all of it; a resumed run at least takes its last step.
        """
        budget, fresh = self.clock.budget, self.opened.resumed_from is None
        if budget.unit != "seconds":
            return
        remedy, took = _faster_start(self.config, fresh, compiling, state), compiling + state
        if fresh and self.clock.fraction() >= 1.0:
            raise RunError(
                f"the budget of {budget} was over before the first step: starting took "
                f"{self.clock.spent.seconds:.1f} s. {remedy}"
            )
        if took > _LONG_START * budget.amount:
            share = took / budget.amount
            self.announce("start", f"starting took {took:.1f} s, {share:.0%} of the budget. {remedy}")


def _write_what_is_known(opened: Opened) -> None:
    """Make the run directory what it is at its start."""
    write_atomically(opened.out / "config.yaml", config_text(opened.config))
    write_atomically(opened.out / "tokenizer.json", opened.tokenizer_json)
    if isinstance(opened.data, PreparedExamples) and opened.data.template is not None:
        write_atomically(opened.out / CHAT_TEMPLATE, opened.data.template)


def _faster_start(config: RunConfig, fresh: bool, compiling: float, state: float) -> str:
    """What helps a run whose start takes too much of its budget: by what takes more, compiling or its first state."""
    if state > compiling and not fresh:
        return "Most of that is reading the checkpoint: a larger --budget helps."
    if state > compiling:
        return "Most of that is making the first state: a smaller recipe or a larger --budget helps."
    scan = "" if config.train.layer_loop == "scan" else "--train.layer_loop=scan, "
    return (
        "Most of that is compiling, and compiled programs are kept: a second run of the same recipe starts faster. For "
        f"the first, {scan}a smaller recipe or a larger --budget helps."
    )
