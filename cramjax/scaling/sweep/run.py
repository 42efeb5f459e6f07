"""A sweep: trials handed to an engine, and one table of what came of them.

Everything lives in the sweep's directory, so a sweep that was stopped or killed goes on when it is run again: done
trials are kept, interrupted ones continue from their checkpoints, failed ones are tried once more.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from cramjax.cache import write_atomically
from cramjax.errors import ConfigError, RunError, RunInterruptedError
from cramjax.recipes import differing_fields, from_yaml, to_yaml
from cramjax.scaling.sweep.axes import Trial, read_sweep
from cramjax.scaling.sweep.engines import RunEngine
from cramjax.scaling.sweep.results import TABLE, Row, row_of, write_table
from cramjax.scaling.sweep.trial import config_file, is_done

if TYPE_CHECKING:
    from cramjax.training.signals import Signals

Engine = Literal["local", "ray", "slurm"]


class SweepDisplay(Protocol):
    """Shows a sweep; entered when it starts and left when it ends."""

    def show(self, rows: Sequence[Row], running: Sequence[str]) -> None:
        """Show where all trials stand, a few times a second."""
        ...

    def ended(self, row: Row) -> None:
        """Show that a trial's process has ended."""
        ...

    def message(self, text: str) -> None:
        """Show a sentence."""
        ...


@dataclass(frozen=True, repr=False)
class Sweep:
    """A sweep that has run.

    Attributes:
        path: its directory.
        rows: the table, a mapping for each trial.
    """

    path: Path
    rows: tuple[Row, ...]

    @property
    def table(self) -> Path:
        """The Parquet file of the rows, for `cramjax.fit_scaling`."""
        return self.path / TABLE

    @property
    def counts(self) -> dict[str, int]:
        """How many trials are done, failed, stopped or waiting."""
        return dict(Counter(row["status"] for row in self.rows))

    def __repr__(self) -> str:
        counts = ", ".join(f"{number} {status}" for status, number in self.counts.items())
        return f"Sweep({str(self.table)!r}: {counts})"


def run_sweep(
    sweep: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    engine: Engine = "local",
    overrides: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    address: str | None = None,
    cpus: int | None = None,
    gpus: float | None = None,
    display: "AbstractContextManager[SweepDisplay] | None" = None,
) -> Sweep:
    """Run what a sweep lacks.

    Args:
        sweep: the name or the path of its YAML file, or its content.
        out: its directory, made if need be. With Ray on several machines, or Slurm, all must see it.
        engine: where trials run: `local`, `ray` or `slurm`.
        overrides: fields that differ from the file's, by dotted key.
        jobs: trials at the same time. Default: what the machine or the cluster has room for.
        address: of a Ray cluster. Default: a Ray of its own on this machine.
        cpus: for each trial, with Ray (default 1) or Slurm (default 1).
        gpus: for each trial, with Ray or Slurm (default 0).
        display: shows progress. Default: nothing.

    Raises:
        ConfigError: the sweep or an option cannot be, or `out` holds another sweep.
        RunInterruptedError: SIGTERM or SIGINT arrived; the runs have saved themselves.
    """
    from cramjax.scaling.sweep.display import QuietDisplay
    from cramjax.training.signals import catch_signals

    trials, out = read_sweep(sweep, overrides), Path(out)
    run_engine = _engine(engine, out, jobs, address, cpus, gpus)
    _write_trials(trials, out)
    rows = {trial.name: row_of(trial, out) for trial in trials}
    by_name = {trial.name: trial for trial in trials}
    missing = [trial.name for trial in trials if not is_done(out, trial.name)]
    write_table(list(rows.values()), out)
    with display or QuietDisplay() as screen, catch_signals() as signals:
        if len(missing) < len(trials):
            screen.message(f"{len(trials) - len(missing)} of {len(trials)} trials are done already.")

        def tick(running: Sequence[str]) -> None:
            screen.show(list(rows.values()), running)

        tick([])
        for name in run_engine(missing, lambda: signals.received is not None, tick) if missing else ():
            rows[name] = row_of(by_name[name], out)
            write_table(list(rows.values()), out)
            screen.ended(rows[name])
        tick([])
    _raise_if_stopped(signals, out, rows)
    return Sweep(out, tuple(rows.values()))


def _raise_if_stopped(signals: "Signals", out: Path, rows: Mapping[str, Row]) -> None:
    if signals.received is not None and any(row["status"] in ("stopped", "waiting") for row in rows.values()):
        done = sum(row["status"] == "done" for row in rows.values())
        raise RunInterruptedError(
            f"stopped with {done} of {len(rows)} trials done; the table is {out / TABLE}. Run the same command again "
            "to go on.",
            signals.received,
        )


def _write_trials(trials: Sequence[Trial], out: Path) -> None:
    """Write what each trial is to run; what is there already must be the same."""
    try:
        (out / "trials").mkdir(parents=True, exist_ok=True)
        (out / "runs").mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {out}: {error.strerror}. Give another --out.") from None
    missing = [trial for trial in trials if not config_file(out, trial.name).exists()]
    for trial in trials:
        file = config_file(out, trial.name)
        if trial in missing or (text := file.read_text(encoding="utf-8")) == to_yaml(trial.config):
            continue
        for key, (old, new) in differing_fields(from_yaml(text, str(file)), trial.config).items():
            raise ConfigError(
                f"{out} holds the trial {trial.name} with another configuration ({key} was {old}, now {new}): give "
                "another --out, or restore the sweep."
            )
    for trial in missing:
        write_atomically(config_file(out, trial.name), to_yaml(trial.config))


def _engine(
    engine: str, out: Path, jobs: int | None, address: str | None, cpus: int | None, gpus: float | None
) -> RunEngine:
    """The engine asked for, its options checked."""
    if engine not in get_args(Engine):
        raise ConfigError(f"engine must be one of {', '.join(get_args(Engine))}, got {engine!r}.")
    for option, value in (("--jobs", jobs), ("--cpus", cpus)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} must be 1 or more, got {value}.")
    if address is not None and engine != "ray":
        raise ConfigError(f"--address is of a Ray cluster, and the engine is {engine}: give --engine ray.")
    if engine == "local":
        if cpus is not None or gpus is not None:
            raise ConfigError(
                "--cpus and --gpus are for the engines ray and slurm; here a trial has one GPU, or its share of the "
                "cores: give --jobs."
            )
        from cramjax.scaling.sweep.engines import local

        if jobs is not None:
            local.slots(jobs, 1)
        return lambda names, stopping, tick: local.run(names, out, local.slots(jobs, len(names)), stopping, tick)
    if engine == "ray":
        from cramjax.scaling.sweep.engines import ray

        return ray.connected(out, jobs=jobs, address=address, cpus=cpus, gpus=gpus)
    from cramjax.scaling.sweep.engines import slurm

    return slurm.prepared(out, jobs=jobs, cpus=cpus, gpus=gpus)
