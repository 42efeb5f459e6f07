"""Opening a run: its data prepared and its parts made, or a resume judged; nothing is written to its directory."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cramjax import devices
from cramjax.budget import Budget, Clock, Spent
from cramjax.compiling import keep_programs
from cramjax.config import RunConfig
from cramjax.data import PreparedData, Sequences, prepare, require_sequences
from cramjax.data.examples import ExampleRows, PreparedExamples, PreparedLabels, prepare_examples, prepare_labels
from cramjax.errors import ConfigError, RunError
from cramjax.recipes import from_yaml
from cramjax.start import start
from cramjax.training.based import require_same_base
from cramjax.training.checkpoint import Meta, read_meta
from cramjax.training.continuing import run_vocabulary
from cramjax.training.meter import Meter
from cramjax.training.parts import build_parts
from cramjax.training.program import Parts

Prepared = PreparedData | PreparedExamples | PreparedLabels


@dataclass(frozen=True)
class Opened:
    """A run before its session."""

    config: RunConfig
    out: Path
    """The run directory."""
    resumed_from: Path | None
    """The checkpoint to continue from."""
    meta: Meta | None
    """What that holds beside its arrays."""
    clock: Clock
    """Stands still."""
    final_fraction: float
    """The spent fraction that its last step was planned for."""
    data: Prepared
    tokenizer_json: str
    """Its tokenizer, as the text of a `tokenizer.json`."""
    prepare_seconds: float
    sequences: Sequences | ExampleRows
    parts: Parts
    meter: Meter


def open_run(
    config: RunConfig, out: Path, resumed_from: Path | None, progress: Callable[[str], None], lost: float = 0.0
) -> Opened:
    """Open a run, new or to be resumed.

    Args:
        config: the whole run.
        out: the run directory.
        resumed_from: checkpoint to continue from.
        progress: is told how far preparing its data is.
        lost: seconds that starts before this one took, which came to nothing.

    Raises:
        UserError: the data, the configuration or the checkpoint cannot be used.
    """
    _check_kind(config)
    devices.keep_freed_memory()
    start()
    meta = None if resumed_from is None else read_meta(resumed_from)
    budget = Budget.parse(config.budget)
    clock = Clock(budget, Spent(seconds=lost) if meta is None else Spent(**meta.spent))  # pyright: ignore
    final_fraction = 0.0 if meta is None else _planned_fraction(meta, config, clock)
    over = clock.fraction() >= 1.0 if meta is None else final_fraction == 1.0
    if over and (out / "summary.json").exists():
        raise RunError(f"{out} has spent its budget of {budget}: give a larger one, as --budget, to go on.")
    keep_programs(config.data.cache_dir)
    started = time.monotonic()
    data = prepared_data(config, out, progress)
    prepare_seconds, tokenizer_json = time.monotonic() - started, data.tokenizer.to_json()
    if meta is not None:
        _require_same_data(meta, data, tokenizer_json, resumed_from)
    parts = build_parts(config, data.tokenizer)
    if not isinstance(data, PreparedData):
        sequences = ExampleRows(data.train, config.seed)
    else:
        extra, order = 1 if config.objective.causal else 0, config.data.order
        sequences = Sequences(data.train, config.data.sequence_length, extra=extra, seed=config.seed, order=order)
    require_sequences(sequences, config.batch.size)
    if meta is not None:
        require_same_base(meta, config)
    meter = _meter(config, parts, data)
    _require_one_step(config, meter, parts, budget)
    return Opened(
        config,
        out,
        resumed_from,
        meta,
        clock,
        final_fraction,
        data,
        tokenizer_json,
        prepare_seconds,
        sequences,
        parts,
        meter,
    )


def prepared_data(config: RunConfig, out: Path, progress: Callable[[str], None]) -> Prepared:
    """What a run trains on and is scored on, from the cache if it is there.

    Args:
        config: the run.
        out: its directory.
        progress: is told how far preparing is.

    Raises:
        UserError: the data cannot be used.
    """
    if config.examples is None and config.labels is None:
        return prepare(config.data, config.tokenizer, progress=progress)
    tokenizer, template = run_vocabulary(config, out)
    if config.labels is not None:
        return prepare_labels(config.labels, tokenizer, config.data.sequence_length, progress=progress)
    assert config.examples is not None
    return prepare_examples(config.examples, tokenizer, template, config.data.sequence_length, progress=progress)


def _planned_fraction(meta: Meta, config: RunConfig, clock: Clock) -> float:
    """Where a resumed run stands: what its last step was planned for, unless the budget is another one since."""
    then = from_yaml(meta.config, where="the checkpoint's configuration")
    # How devices share the work changes no number but by rounding.
    free = ["data_parallel", "fsdp", "zero", "remat"]
    if then.train.compute_dtype == "auto":  # of a run that did not write down what it chose
        free.append("compute_dtype")
    given = {name: getattr(config.train, name) for name in free}
    same = dataclasses.replace(then, budget=config.budget, train=dataclasses.replace(then.train, **given))
    if then.start_from is not None:  # whose vocabulary may lie elsewhere by now; what it is, is compared with the data
        same = dataclasses.replace(same, tokenizer=dataclasses.replace(then.tokenizer, path=config.tokenizer.path))
    if same != config:
        raise RunError(
            "the checkpoint is of another configuration than the run directory's config.yaml, of which only the budget "
            "may change, and how devices share the work (train.data_parallel, train.fsdp, train.zero, train.remat): "
            "restore it, or start a new run."
        )
    return meta.final_fraction if then.budget == config.budget else clock.fraction()


def _require_same_data(meta: Meta, data: Prepared, tokenizer_json: str, checkpoint: Path | None) -> None:
    if meta.tokenizer != tokenizer_json:
        raise RunError(
            f"{checkpoint} was trained with another vocabulary than its data now gives: the corpus has changed "
            "since. Restore it, or start a new run."
        )
    if meta.data != data.train.identity:
        raise RunError(
            f"{checkpoint} was trained on other tokens than its data now gives ({meta.data}; now "
            f"{data.train.identity}): the corpus has changed since. Restore it, or start a new run."
        )


def _meter(config: RunConfig, parts: Parts, data: Prepared) -> Meter:
    pairs = config.objective.kind == "preference"
    peak = devices.peak_flops(parts.mesh.devices.flat[0], parts.model.compute_dtype)
    return Meter(
        parts.microbatch * config.data.sequence_length,
        parts.flops_per_token,
        None if peak is None else peak * parts.mesh.size,
        None if isinstance(data, PreparedLabels) or pairs else data.train.bytes_per_token,
    )


def _require_one_step(config: RunConfig, meter: Meter, parts: Parts, budget: Budget) -> None:
    first = config.batch.size if not config.batch.ramp else parts.microbatch
    cost = getattr(meter.cost(first // parts.microbatch), budget.unit)
    if cost > budget.amount:
        raise ConfigError(
            f"budget {budget} is too small for one step, which takes {cost:.3g} {budget.unit}: give a larger "
            "budget or a smaller batch.size."
        )


def _check_kind(config: RunConfig) -> None:
    """Refuse an objective that is not that of the data."""
    kind, examples = config.objective.kind, config.examples
    if config.labels is not None:
        right, given = config.objective.labelled, "with the group `labels`"
    elif examples is not None:
        right, given = kind == examples.objective, f"with `examples.format={examples.format}`"
    else:
        right, given = kind in ("causal", "masked"), "without the groups `labels` and `examples`"
    if not right:
        raise ConfigError(f"objective.kind={kind} is not what a run {given} has: leave it out.")
