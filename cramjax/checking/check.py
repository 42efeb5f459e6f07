"""All that is checked of a machine, and what it came to."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from cramjax import devices
from cramjax.checking.cases import KERNELS, sizes_for
from cramjax.checking.kernels import Row, Tell, check_kernels
from cramjax.checking.machine import Ceiling, Machine, ceilings, this_machine
from cramjax.checking.step import Step, small_step
from cramjax.errors import ConfigError
from cramjax.show.values import Viewed
from cramjax.start import start
from cramjax.training.parts import resolve_dtype

if TYPE_CHECKING:
    from cramjax.show.tables import Page


@dataclass(frozen=True, repr=False)
class Check(Viewed):
    """What this machine is, computes and reaches."""

    machine: Machine
    ceilings: Sequence[Ceiling]
    rows: Sequence[Row]
    """Every implementation of every kernel, on every case."""
    step: Step
    seconds: float
    """That it all took."""

    @property
    def wrong(self) -> list[str]:
        """What is not right, by name; empty where all is."""
        rows = [f"{row.kernel} {row.case} {row.dtype} {row.implementation}" for row in self.rows if row.wrong]
        return rows + ([f"step of {self.step.recipe}"] if self.step.wrong else [])

    def ratio(self, row: Row) -> float | None:
        """Time of an implementation over that of the one that is chosen; None where they were not both timed."""
        same = (row.kernel, row.case, row.dtype)
        chosen = next((r for r in self.rows if r.chosen and (r.kernel, r.case, r.dtype) == same), None)
        if chosen is None or chosen.seconds is None or row.seconds is None:
            return None
        return row.seconds / chosen.seconds

    def json(self) -> dict[str, Any]:
        """Everything as plain values; a number that is not finite is None."""
        rows = [
            dataclasses.asdict(row) | {"error": row.error, "wrong": row.wrong, "ratio": self.ratio(row)}
            for row in self.rows
        ]
        return _finite(
            {
                "passed": not self.wrong,
                "wrong": self.wrong,
                "machine": dataclasses.asdict(self.machine),
                "ceilings": [dataclasses.asdict(ceiling) for ceiling in self.ceilings],
                "kernels": rows,
                "step": dataclasses.asdict(self.step) | {"wrong": self.step.wrong},
                "seconds": self.seconds,
            }
        )

    def __rich__(self) -> "Page":
        from cramjax.checking.show import page

        return page(self)


def check(
    *, quick: bool = False, kernels: Sequence[str] | None = None, tell: Tell = lambda what, done, total: None
) -> Check:
    """Check this machine: what it is, every kernel against float32, its ceilings, and a small training step.

    Every implementation runs forward and backward, on every mask, at the sizes of the recipes where they fit; it is
    timed where the recipes ask for it.

    Args:
        quick: smaller shapes, and one precision.
        kernels: names of those to check. Default: all.
        tell: hears of the progress.

    Raises:
        ConfigError: no kernel is named, there is none of a name, or a GPU that cannot be used.
    """
    started = time.perf_counter()
    names = list(KERNELS) if kernels is None else list(kernels)
    if isinstance(kernels, str) or not names:
        raise ConfigError(f"kernels must be a list of names, got {kernels!r}: choose from {', '.join(KERNELS)}.")
    if unknown := [name for name in names if name not in KERNELS]:
        raise ConfigError(f"There is no kernel {unknown[0]!r} to check: choose from {', '.join(KERNELS)}.")
    devices.keep_freed_memory()
    tell("looking at the machine", 0, 1)
    device = start()[0]
    machine = this_machine()
    sizes = sizes_for(machine.platform, machine.memory, quick=quick)
    dtype = resolve_dtype("auto")
    dtypes = [dtype, *(other for other in ("bfloat16", "float32") if other != dtype and not quick)]
    with jax.default_device(device):
        tell("measuring ceilings", 0, 1)
        found = ceilings(quick)
        rows = check_kernels({name: KERNELS[name](sizes) for name in names}, dtypes, tell)
        tell("compiling and timing a small step", 0, 1)
        step = small_step()
    return Check(machine, found, rows, step, time.perf_counter() - started)


def _finite(value: Any) -> Any:
    """Plain values, with None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
