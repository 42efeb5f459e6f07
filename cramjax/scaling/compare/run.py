"""Runs two recipes in turn, the same seeds for both, and compares what they reach.

Each run is a child process of its own, one at a time: a clean jax, a whole budget. Data is prepared before, outside the
budgets, and each recipe takes one step that is thrown away, so that every run finds its programs compiled and the first
one does not pay for the rest. The order within a pair alternates (AB, BA, AB, …), so that a machine that slows down
favours neither. What a run leaves in the directory is all the state there is: a comparison that was stopped goes on.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cramjax.budget import Budget
from cramjax.cache import write_atomically
from cramjax.config import RunConfig
from cramjax.data.examples import PreparedExamples, PreparedLabels
from cramjax.errors import ConfigError, RunError
from cramjax.loading import read_text
from cramjax.recipes import differing_fields, from_yaml, to_yaml
from cramjax.scaling.child import run_lock
from cramjax.scaling.compare.comparison import (
    ACCURACY,
    BITS,
    SQUARED_ERROR,
    Comparison,
    Measure,
    Outcome,
    Pair,
    Side,
)
from cramjax.scaling.compare.display import ComparisonDisplay
from cramjax.training.continuing import continued, require_model
from cramjax.training.opening import Prepared, prepared_data
from cramjax.training.signals import Signals, catch_signals

_POLL_SECONDS = 0.25
_FAILURE = "failure.txt"
_ORDERS: tuple[tuple[Side, Side], ...] = (("a", "b"), ("b", "a"))


def compare(
    a: RunConfig,
    b: RunConfig,
    out: Path,
    *,
    seeds: int = 5,
    names: tuple[str, str] = ("A", "B"),
    display: ComparisonDisplay | None = None,
) -> Comparison:
    """Train both configurations with the same seeds, one run at a time, and compare their held-out scores.

    These are bits per byte; on preferences and labels accuracy, or the mean squared error of numbers.

    To add pairs to a comparison, give its directory and a larger number; an interval that was looked at on the way,
    and is the reason to stop, covers less than its 95%.

    Args:
        a: one configuration; pair i of the comparison has the seed `a.seed + i`.
        b: the other; of its seed nothing is read.
        out: the comparison's directory: new, or one of the same comparison, which goes on: finished and failed runs
            are kept, interrupted ones are resumed, or started over if their budget is a time.
        seeds: pairs.
        names: what the two are called.
        display: shows progress; default: nothing.

    Returns:
        The comparison. A run that failed says why, and its pair does not count. After SIGINT or SIGTERM: what has
        been done, and `interrupted_by`.

    Raises:
        ConfigError: the two cannot be compared.
        DataError: the data of one cannot be prepared.
        RunError: the directory is another comparison's or in use, or one of the two cannot take a step.
    """
    display = display or ComparisonDisplay(None)
    if seeds < 1:
        raise ConfigError(f"seeds must be 1 or more, got {seeds}.")
    for each in (a, b):
        require_model(each)
    a, b = continued(a), continued(replace(b, seed=a.seed))
    warnings, measure = _require_comparable(a, b), _measure(a)
    if out.exists():
        _require_same(out, a, b)
    for warning in warnings:
        display.message(f"warning: {warning}")
    held_out = _common_text(a, b, out, display)
    with _claimed(out, a, b, held_out):
        sides: dict[Side, RunConfig] = {"a": a, "b": b}

        def result(interrupted_by: int | None = None) -> Comparison:
            """What the directory holds by now, written there as well."""
            pairs = tuple(
                Pair(
                    seed,
                    _outcome(_run_directory(out, seed, "a"), measure),
                    _outcome(_run_directory(out, seed, "b"), measure),
                )
                for seed in range(a.seed, a.seed + seeds)
            )
            found = Comparison(
                a=names[0],
                b=names[1],
                budget=a.budget,
                objective=a.objective.kind,
                differing=differing_fields(a, b),
                pairs=pairs,
                path=out,
                held_out=held_out,
                measure=measure,
                warnings=warnings,
                interrupted_by=interrupted_by,
            )
            write_atomically(out / "comparison.json", json.dumps(found.json(), indent=1, allow_nan=False) + "\n")
            return found

        left: list[tuple[int, Side]] = [
            (a.seed + i, side)
            for i in range(seeds)
            for side in _ORDERS[i % 2]
            if _outcome(_run_directory(out, a.seed + i, side), measure) is None
        ]
        with display, catch_signals() as signals:
            display.results(result())
            for side in sides if left else ():
                _warm_up(out, side, sides[side], signals, display)
            for seed, side in left:
                if signals.received is not None:
                    break
                display.running(f"seed {seed}, {side.upper()}")
                _run(_run_directory(out, seed, side), replace(sides[side], seed=seed), signals, display)
                display.ended(_outcome(_run_directory(out, seed, side), measure))
                display.results(result())
        return result(signals.received)


def _require_comparable(a: RunConfig, b: RunConfig) -> tuple[str, ...]:
    """Refuse what the configurations alone show to be unfair; returns what to keep in mind."""
    if a.labels is not None and b.labels is not None:  # scored alike whatever the model
        if a.labels.target != b.labels.target:
            raise ConfigError(
                f"A predicts a {a.labels.target} and B a {b.labels.target}: give both the same labels.target."
            )
    elif a.objective.kind != b.objective.kind:
        raise ConfigError(
            f"A is {a.objective.kind} and B is {b.objective.kind}, whose scores are different things. Compare two of "
            "one kind."
        )
    if Budget.parse(a.budget) != Budget.parse(b.budget):
        raise ConfigError(f"A has a budget of {a.budget} and B of {b.budget}: give both the same one, as --budget.")
    differing = differing_fields(a, b)
    warnings = []
    if a.objective.kind == "masked":
        rates = [o.mask_rate if o.mask_rate_end is None else o.mask_rate_end for o in (a.objective, b.objective)]
        if rates[0] != rates[1]:
            raise ConfigError(
                f"A is scored with {rates[0]:g} of its tokens masked and B with {rates[1]:g}, which is another task: "
                "give both the same objective.mask_rate_end."
            )
        if any(key.startswith("tokenizer.") for key in differing):
            warnings.append("masked models with different tokenizers guess different pieces: their bits compare badly.")
    if not differing:
        warnings.append("A and B are the same configuration: what differs is noise.")
    return tuple(warnings)


def _measure(config: RunConfig) -> Measure:
    if config.labels is None:
        return ACCURACY if config.objective.kind == "preference" else BITS
    return SQUARED_ERROR if config.labels.target == "number" else ACCURACY


def _common_text(a: RunConfig, b: RunConfig, out: Path, display: ComparisonDisplay) -> dict[str, Any]:
    """Prepare the data of both; what identifies their held-out text, which must be the same."""
    texts = [_identity(prepared_data(c, out, display.message)) for c in (a, b)]
    if texts[0] != texts[1]:
        fields = [
            f"{k}: {x} → {y}"
            for k, (x, y) in differing_fields(a, b).items()
            if k.startswith(("data.", "examples.", "labels."))
        ]
        raise ConfigError(
            f"A and B hold out different text ({'; '.join(fields) or 'of the same sources'}), and scores on "
            "different text cannot be compared: give both the same data.validation (of examples: "
            "examples.validation; of labels: labels.validation), or the same data."
        )
    return texts[0]


def _identity(data: Prepared) -> dict[str, Any]:
    if isinstance(data, PreparedExamples):  # whatever rows they are packed into
        held_out = data.validation
        each = (held_out.store.example(int(number)) for number in held_out.order)
        found = sorted(hashlib.sha256(one.ids.tobytes() + one.predicted.tobytes()).digest() for one in each)
        return {"bytes": held_out.counts.text_bytes, "sha256": hashlib.sha256(b"".join(found)).hexdigest()}
    if isinstance(data, PreparedLabels):
        return dict(data.held_out)
    digest = hashlib.sha256(data.validation_text.read_bytes()).hexdigest()
    return {"bytes": data.validation.text_bytes, "sha256": digest}


def _require_same(out: Path, a: RunConfig, b: RunConfig) -> None:
    """Refuse a directory that holds something else."""
    if not out.is_dir() or ({path.name for path in out.iterdir()} - {".lock"} and not (out / "a.yaml").is_file()):
        raise RunError(f"{out} exists already and is no comparison: choose another --out.")
    for name, config in (("a", a), ("b", b)):
        file = out / f"{name}.yaml"
        if file.is_file() and from_yaml(read_text(file), str(file)) != config:
            raise RunError(
                f"{out} is another comparison: its {file.name} is not what {name.upper()} is now. Choose another "
                "--out, or give the same recipes, options and budget to continue it."
            )


@contextlib.contextmanager
def _claimed(out: Path, a: RunConfig, b: RunConfig, held_out: dict[str, Any]) -> Iterator[None]:
    """Make the directory, or check that its runs were scored on the same text; nobody else may write there."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{out} is in use by another process: wait for it, or choose another --out.") from None
    try:
        _require_same(out, a, b)  # again: another process may have been here while data was prepared
        file = out / "comparison.json"
        if file.exists() and (then := json.loads(file.read_text(encoding="utf-8"))["held_out"]) != held_out:
            raise RunError(
                f"the held-out text of {out} has changed since ({then['bytes']:,} bytes then, {held_out['bytes']:,} "
                "now, or other ones): restore the corpus, or choose another --out."
            )
        for name, config in (("a", a), ("b", b)):
            write_atomically(out / f"{name}.yaml", to_yaml(config))
        yield
    finally:
        lock.release()


def _run_directory(out: Path, seed: int, side: Side) -> Path:
    return out / f"seed-{seed}" / side


def _outcome(path: Path, measure: Measure) -> Outcome | None:
    """What a run came to; None if it has not ended."""
    failure, summary = path / _FAILURE, path / "summary.json"
    if failure.exists():
        return Outcome(failure=failure.read_text(encoding="utf-8"))
    if not summary.exists():
        return None
    read = json.loads(summary.read_text(encoding="utf-8"))
    ended = {"tokens": read["tokens"], "steps": read["steps"], "seconds": read["train_seconds"]}
    if not math.isfinite(read["loss"]):
        return Outcome(**ended, failure=f"its held-out loss is {read['loss']}")
    return Outcome(score=read[measure.name], measure=measure.words, **ended)


def _warm_up(out: Path, side: Side, config: RunConfig, signals: Signals, display: ComparisonDisplay) -> None:
    """Compile a recipe's programs into the cache, by a run of one step that is thrown away."""
    if signals.received is not None:
        return
    display.running(f"{side.upper()}: compiling")
    with tempfile.TemporaryDirectory(dir=out, prefix=".warm-up-") as directory:
        path = Path(directory) / "run"
        failure = _spawn(path, replace(config, budget="1steps"), signals, display)
        if failure is not None and signals.received is None:
            raise RunError(f"{side.upper()} cannot run: {failure}")


def _run(path: Path, config: RunConfig, signals: Signals, display: ComparisonDisplay) -> None:
    """One run to its end, or as far as it comes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with run_lock(path):  # a child whose comparison was killed may still be saving, or even come to its end
        if (path / _FAILURE).exists() or (path / "summary.json").exists():
            return
        timed = Budget.parse(config.budget).unit == "seconds"
        if timed or not (path / "config.yaml").exists():  # a time budget with a pause in it is not a fair one
            shutil.rmtree(path, ignore_errors=True)
    failure = _spawn(path, config, signals, display)
    if signals.received is None and failure is not None:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / _FAILURE, failure)


def _spawn(path: Path, config: RunConfig, signals: Signals, display: ComparisonDisplay) -> str | None:
    """Run a configuration in a child process; returns why it failed, or None. On a signal it is stopped and waited for.

    The child has a session of its own, so that Ctrl-C reaches it once and from here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe, log = path.with_suffix(".yaml"), path.with_suffix(".log")
    recipe.write_text(to_yaml(config), encoding="utf-8")
    command = [sys.executable, "-m", "cramjax.scaling.child", str(recipe), str(path), str(os.getpid())]
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    told = False
    try:
        while child.poll() is None:
            if signals.received is not None and not told:
                told = True
                child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_POLL_SECONDS)
            display.progress(path)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        recipe.unlink()
    if child.returncode == 0 and (path / "summary.json").exists():
        log.unlink()
        return None
    return _why(child.returncode, log.read_text(encoding="utf-8", errors="replace"))


def _why(code: int, log: str) -> str:
    """The reason of a failure: the child's error, else its last line, and the signal that ended it."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    number = -code if code < 0 else code - 128 if code > 128 else None
    end = f"exit code {code}" if number is None else f"ended by {signal.Signals(number).name}"
    return f"{end}: {lines[-1]}" if lines else end
