"""A run in progress: what lives and changes while a budget is spent, and the acts the loop is made of."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from cramjax import devices
from cramjax.budget import Budget, Clock, Spent
from cramjax.cache import write_atomically
from cramjax.compiling import keep_programs, time_budget
from cramjax.config import RunConfig
from cramjax.data import Prefetcher, PreparedData, Sequences, prepare, require_sequences
from cramjax.errors import ConfigError, OutOfMemoryError, RunError
from cramjax.optim import schedule
from cramjax.parallel import batch_sharding, on_mesh
from cramjax.recipes import from_yaml, to_yaml
from cramjax.start import start
from cramjax.training import checkpoint as checkpoints
from cramjax.training.display import Display
from cramjax.training.heldout import Evaluation, HeldOut
from cramjax.training.meter import Meter
from cramjax.training.metrics import RunLog
from cramjax.training.parts import Parts, build_parts
from cramjax.training.profile import Profiler
from cramjax.training.program import step_program
from cramjax.training.run import Run, config_text
from cramjax.training.step import Batch, State, StepMetrics, evaluation_params

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
    """A run between its first and its last step.

    Args:
        config: the whole run.
        out: the run directory.
        resumed_from: checkpoint to continue from.
        display: shows progress.
        lost: seconds that starts before this one took, which came to nothing.

    Raises:
        UserError: the data, the configuration or the checkpoint cannot be used.
    """

    def __init__(self, config: RunConfig, out: Path, resumed_from: Path | None, display: Display, lost: float = 0.0):
        devices.keep_freed_memory()
        start()
        self.config, self.out, self.display = config, out, display
        meta = None if resumed_from is None else checkpoints.read_meta(resumed_from)
        budget = Budget.parse(config.budget)
        spent = Spent(seconds=lost) if meta is None else Spent(**meta.spent)  # pyright: ignore[reportArgumentType]
        self.clock = Clock(budget, spent)
        self.final_fraction = 0.0 if meta is None else _planned_fraction(meta, config, self.clock)
        over = self.clock.fraction() >= 1.0 if meta is None else self.final_fraction == 1.0
        if over and (out / "summary.json").exists():
            raise RunError(f"{out} has spent its budget of {budget}: give a larger one, as --budget, to go on.")
        keep_programs(config.data.cache_dir)

        started = time.monotonic()
        self.data: PreparedData = prepare(config.data, config.tokenizer, progress=display.message)
        self.prepare_seconds = time.monotonic() - started
        self._tokenizer_json = self.data.tokenizer.to_json()
        if meta is not None and meta.tokenizer != self._tokenizer_json:
            raise RunError(
                f"{resumed_from} was trained with another vocabulary than its data now gives: the corpus has changed "
                "since. Restore it, or start a new run."
            )
        if meta is not None and meta.data != self.data.train.identity:
            raise RunError(
                f"{resumed_from} was trained on other tokens than its data now gives ({meta.data}; now "
                f"{self.data.train.identity}): the corpus has changed since. Restore it, or start a new run."
            )
        self.parts: Parts = build_parts(config, self.data.tokenizer)
        self.causal = config.objective.kind == "causal"
        self.sequences = Sequences(
            self.data.train,
            config.data.sequence_length,
            extra=1 if self.causal else 0,
            seed=config.seed,
            order=config.data.order,
        )
        require_sequences(self.sequences, config.batch.size)
        self.meter = self._new_meter()
        self._require_one_step(budget)

        out.mkdir(parents=True, exist_ok=True)
        for stale in ("summary.json", "report.html"):  # of a smaller budget
            (out / stale).unlink(missing_ok=True)
        write_atomically(out / "config.yaml", config_text(config))
        write_atomically(out / "tokenizer.json", self._tokenizer_json)
        self.log = RunLog(out, last_step=0 if meta is None else meta.step)
        self._writer = checkpoints.CheckpointWriter(out / "checkpoints", config.checkpoint.keep)
        self._last_save, self._saved_step = time.monotonic(), None if meta is None else meta.step
        self._profiler = Profiler(out, lambda: self.step_function.as_text() or "") if config.train.profile else None
        self._rollbacks = 0
        self.longest_pause = 0.0
        self.position = 0 if meta is None else meta.position
        self._resumed_from = resumed_from
        if self.log.damaged:
            self.announce("log", f"{self.log.damaged} damaged lines of metrics.jsonl are left out.")
        if meta is None:
            self.announce("data", str(self.data))

    def start(self) -> None:
        """Start the clock; make or restore the state, feed the data, and compile the step.

        Raises:
            RunError: a time budget is over before the first step, or the checkpoint is of another configuration.
        """
        if self.final_fraction < 1.0:  # a run that was killed after its last step owes only what is not charged
            self.clock.start()
        began, mesh, parts, config = time.monotonic(), self.parts.mesh, self.parts, self.config
        self._prefetcher = Prefetcher(self.sequences, self.position, parts.microbatch, config.train.prefetch)
        rows = batch_sharding(mesh)
        self.held_out = HeldOut(
            on_mesh(mesh, parts.loss_function),
            self.data.validation,
            config.data.sequence_length,
            causal=self.causal,
            batch=-(-config.evaluate.batch // mesh.size) * mesh.size,
            put=lambda tokens: jax.device_put(tokens, rows),
            seconds=time_budget(config.budget),
        )
        with self._memory_guarded():
            program = step_program(config, parts)
            self.step_function, self._like = program.step.compile(), program.like
            self._batch_sharding = program.batch.tokens.sharding
            compiled = time.monotonic()
            if self._resumed_from is None:
                self.state: State = jax.block_until_ready(program.create(self.display.message))
            else:
                self.state = checkpoints.restore(self._resumed_from, self._like)
        fresh, ended = self._resumed_from is None, time.monotonic()
        took, remedy = ended - began, _faster_start(config, fresh, compiled - began, ended - compiled)
        if self.clock.budget.unit == "seconds":
            if fresh and self.clock.fraction() >= 1.0:  # a resumed run at least takes its last step
                raise RunError(
                    f"the budget of {self.clock.budget} was over before the first step: starting took "
                    f"{self.clock.spent.seconds:.1f} s. {remedy}"
                )
            if took > _LONG_START * self.clock.budget.amount:
                share = took / self.clock.budget.amount
                self.announce("start", f"starting took {took:.1f} s, {share:.0%} of the budget. {remedy}")
        if config.train.nonfinite == "rollback" and fresh:
            self.save()
        self.meter.mark()

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
        length = self.config.data.sequence_length + int(self.causal)
        tokens = np.zeros((self.most_microbatches, self.parts.microbatch, length), np.int32)
        for index in range(microbatches):
            tokens[index] = next(self._prefetcher)
        self.position += microbatches * self.parts.microbatch
        count: Any = np.int32(microbatches)
        return Batch(jax.device_put(tokens, self._batch_sharding), count)

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

    def evaluate(self, fraction: float, max_tokens: int | None) -> Evaluation:
        """Score the current weights on held-out text and log it; if that fails, they are saved first."""
        started = time.monotonic()
        try:
            evaluation = self.held_out.evaluate(self._evaluation_params(), max_tokens)
        except Exception:
            if self._saved_step != self.clock.spent.steps:
                self.save()
            raise
        self.display.record(self.log.write("evaluate", **self._where(fraction), **_scores(evaluation)))
        self.longest_pause = max(self.longest_pause, time.monotonic() - started)
        self.meter.mark()
        return evaluation

    def save(self) -> None:
        """Start writing a checkpoint of this moment; no step may be in flight."""
        started = time.monotonic()
        self._writer.save(
            self.state,
            checkpoints.Meta(
                step=self.clock.spent.steps,
                position=self.position,
                spent=asdict(self.clock.spent),
                config=to_yaml(self.config),
                tokenizer=self._tokenizer_json,
                final_fraction=self.final_fraction,
                data=self.data.train.identity,
            ),
        )
        self._saved_step = self.clock.spent.steps
        self._last_save = time.monotonic()
        self.longest_pause = max(self.longest_pause, self._last_save - started)
        self.meter.mark()

    def score_checkpoint(self, bits_per_byte: float) -> None:
        """Give the checkpoint of this moment its score."""
        self._writer.score(self.clock.spent.steps, bits_per_byte)

    def undo_start(self) -> float:
        """Take back what a start has written that took no step; the seconds that it has spent."""
        self.clock.pause()
        self.wait_for_save()
        self._writer.discard()
        return self.clock.spent.seconds

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
        per_epoch = len(self.sequences) * self.config.data.sequence_length
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
        subset = self.held_out.evaluate(self._evaluation_params(), self.config.evaluate.tokens)
        self.score_checkpoint(subset.bits_per_byte)
        self.wait_for_save()
        final = self.evaluate(self.final_fraction, None)
        spent, device = self.clock.spent, self.parts.mesh.devices.flat[0]
        timed = (self.meter.tokens, self.meter.seconds) if self.meter.steps else (spent.tokens, spent.seconds)
        summary = {
            **_scores(final),
            "budget": self.config.budget,
            "budget_spent": getattr(spent, self.clock.budget.unit),
            "budget_unit": self.clock.budget.unit,
            "final_fraction": self.final_fraction,
            "final_lr": self.config.optim.lr * float(schedule(self.config.optim)(self.final_fraction)),
            "tokens": spent.tokens,
            "epochs": self.position / len(self.sequences),
            "steps": spent.steps,
            "flops": spent.flops,
            **self.meter.speed(*timed),
            "train_seconds": spent.seconds,
            "prepare_seconds": self.prepare_seconds,
            "data": self.data.report["stages"],
            "finish_seconds": time.monotonic() - started,
            "params": self.parts.parameters,
            "device": devices.describe(device),
            "devices": self.parts.mesh.size,
            "memory_bytes": devices.memory_bytes(device),
        }
        write_atomically(self.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        params = jax.device_put(self._evaluation_params(), start()[0])
        del self.state
        return Run(self.out, self.config, self.data.tokenizer, self.parts.model, params, summary)

    def close(self) -> None:
        """Let go of threads and files, once the checkpoint being written is complete."""
        self._writer.join()
        if self._profiler:
            self._profiler.stop()
        if hasattr(self, "_prefetcher"):
            self._prefetcher.close()
        self.log.close()

    @contextlib.contextmanager
    def _memory_guarded(self) -> Iterator[None]:
        """Until the first step has ended, tell running out of memory from other trouble."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or self.meter.steps:
                raise
            if self._resumed_from is not None:  # a checkpoint fixes the batch
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
        self.state = checkpoints.restore(last, self._like)
        self.announce("rollback", f"not finite at {what}: back to {last.name}, skipping the batches since.")
        self.meter.mark()

    def _evaluation_params(self) -> PyTree:
        if self.config.train.offload_optimizer:
            return self.state.params
        return evaluation_params(self.state, self.parts.optimizer)

    def _where(self, fraction: float) -> dict[str, float]:
        spent = self.clock.spent
        return {
            "step": spent.steps,
            "fraction": fraction,
            "seconds": spent.seconds,
            "tokens": spent.tokens,
            "flops": spent.flops,
        }

    def _new_meter(self) -> Meter:
        mesh = self.parts.mesh
        peak = devices.peak_flops(mesh.devices.flat[0], self.parts.model.compute_dtype)
        return Meter(
            self.parts.microbatch * self.config.data.sequence_length,
            self.parts.flops_per_token,
            None if peak is None else peak * mesh.size,
            self.data.train.bytes_per_token,
        )

    def _require_one_step(self, budget: Budget) -> None:
        first = self.config.batch.size if not self.config.batch.ramp else self.parts.microbatch
        cost = getattr(self.meter.cost(first // self.parts.microbatch), budget.unit)
        if cost > budget.amount:
            raise ConfigError(
                f"budget {budget} is too small for one step, which takes {cost:.3g} {budget.unit}: give a larger "
                "budget or a smaller batch.size."
            )


def _planned_fraction(meta: checkpoints.Meta, config: RunConfig, clock: Clock) -> float:
    """Where a resumed run stands: what its last step was planned for, unless the budget is another one since."""
    then = from_yaml(meta.config, where="the checkpoint's configuration")
    # How devices share the work changes no number but by rounding.
    free = ["data_parallel", "fsdp", "zero", "remat"]
    if then.train.compute_dtype == "auto":  # of a run that did not write down what it chose
        free.append("compute_dtype")
    given = {name: getattr(config.train, name) for name in free}
    if dataclasses.replace(then, budget=config.budget, train=dataclasses.replace(then.train, **given)) != config:
        raise RunError(
            "the checkpoint is of another configuration than the run directory's config.yaml, of which only the budget "
            "may change, and how devices share the work (train.data_parallel, train.fsdp, train.zero, train.remat): "
            "restore it, or start a new run."
        )
    return meta.final_fraction if then.budget == config.budget else clock.fraction()


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


def _scores(evaluation: Evaluation) -> dict[str, float]:
    return {
        "loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "perplexity": evaluation.perplexity,
        "accuracy": evaluation.accuracy,
    }
