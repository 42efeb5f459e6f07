"""Kernels against their definition in float32, forward and backward, on the device there is: compiled, compared, timed.

All programs are compiled first, several at a time; only then does anything run, so that nothing else is timed with it.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cramjax import devices
from cramjax.checking.cases import Case
from cramjax.compiling import device_options
from cramjax.errors import ConfigError

Tell = Callable[[str, int, int], None]
"""Is called with what is being done, and how much of how much of it is."""

_DIED = (jax.errors.JaxRuntimeError, NotImplementedError)
"""How a program ends that cannot be compiled or run after all: by XLA, or as Pallas lowers it."""

# Products of what is timed are tuned, as in long runs; to tune those of the rest would be most of its compilation.
_TUNED, _BRIEF = "24h", "1min"


@dataclass(frozen=True)
class Limit:
    """The most that a result may differ from its reference, relative to its norm."""

    error: float
    reason: str


_BFLOAT16 = Limit(
    6e-3,
    "in bfloat16: it rounds operands, results and what lies between by up to 2^-9 (attention on an H100: 2.6e-3)",
)
_TF32 = Limit(
    1.5e-3, "of products in float32 on a GPU: TF32 rounds operands by up to 2^-11 (attention on an H100: 5.2e-4)"
)
_FLOAT32 = Limit(1e-5, "in float32: it rounds by up to 2^-24, which adds up over thousands of terms")


def limit_for(case: Case, dtype: str, platform: str) -> Limit:
    """How far a case's results may be from the reference's.

    Args:
        case: what is computed.
        dtype: `float32` or `bfloat16`, of its activations.
        platform: `cpu`, whose products of float32 are float32, or another.
    """
    if dtype == "bfloat16":
        return _BFLOAT16
    return _TF32 if case.products and platform != "cpu" else _FLOAT32


@dataclass(frozen=True)
class Row:
    """What came of one implementation on one case in one precision."""

    kernel: str
    case: str
    dtype: str
    implementation: str
    shape: tuple[int, ...]
    """Of the first operand."""
    limit: Limit
    errors: Mapping[str, float] | None = None
    """Of the output and each gradient: the norm of the difference from the reference, over the reference's norm."""
    seconds: float | None = None
    """Median of forward and backward; None where it was not timed."""
    chosen: bool = False
    """Whether it is what a run gets."""
    refusal: str | None = None
    """Why it does not compute this here."""
    failure: str | None = None
    """What it died of, though it does not refuse."""

    @property
    def error(self) -> float | None:
        """The greatest of the errors, NaN if one is; None where it computed nothing."""
        return None if self.errors is None else float(np.max(list(self.errors.values())))

    @property
    def wrong(self) -> bool:
        """Whether it failed, or a number is further from its reference than it may be."""
        return self.failure is not None or (self.error is not None and not self.error <= self.limit.error)


def check_kernels(cases: Mapping[str, Sequence[Case]], dtypes: Sequence[str], tell: Tell) -> list[Row]:
    """Check every implementation of every case.

    Args:
        cases: by the name of their kernel.
        dtypes: precisions: the first for every case, the others for timed ones.
        tell: hears of the progress.
    """
    wanted = [
        (kernel, case, dtype)
        for kernel, some in cases.items()
        for case in some
        for dtype in (dtypes if case.timed else dtypes[:1])
    ]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        checks = []
        for kernel, case, dtype in wanted:
            tell("tracing kernels", len(checks), len(wanted))
            checks.append(_Check(kernel, case, dtype, pool))
        for done, check in enumerate(checks):
            tell("compiling kernels", done, len(checks))
            check.compile()
    rows = []
    for done, check in enumerate(checks):
        tell("running kernels", done, len(checks))
        rows += check.run()
    return rows


class _Check:
    """A case in one precision, on its way from tracing to its rows."""

    def __init__(self, kernel: str, case: Case, dtype: str, pool: ThreadPoolExecutor):
        self._case, self._dtype = case, dtype
        self._limit = limit_for(case, dtype, devices.target().platform)
        self._place = kernel, case.name, dtype
        self._refusals: dict[str, str] = {}
        self._failures: dict[str, str] = {}
        self._compiling: dict[str, Future[Any]] = {}
        self._programs: dict[str, Callable[..., dict[str, jax.Array]]] = {}
        device = jax.devices()[0]
        options, brief = device_options(device, _TUNED if case.timed else _BRIEF), device_options(device, _BRIEF)
        with jax.default_matmul_precision("highest"):
            lowered, self._output = _lower(case, "float32", case.reference)
        self._reference = pool.submit(lowered.compile, brief)
        for name in case.implementations:
            try:
                lowered, self._output = _lower(case, dtype, lambda name=name, **given: case.compute(name, **given))
            except ConfigError as refusal:
                # "Attention implementation 'x' cannot run here: …"
                self._refusals[name] = str(refusal).partition(": ")[2].rstrip(".") or str(refusal)
            except _DIED as error:
                self._failures[name] = _first_line(error)
            else:
                self._compiling[name] = pool.submit(lowered.compile, options)

    def compile(self) -> None:
        """Wait for the programs."""
        for name, future in self._compiling.items():
            try:
                self._programs[name] = future.result()
            except _DIED as error:
                self._failures[name] = _first_line(error)
        self._reference.exception()

    def run(self) -> list[Row]:
        """Compute, compare and time."""
        operands = _draw(self._case, self._dtype, self._output)
        errors: dict[str, dict[str, float]] = {}
        try:
            wanted = self._reference.result()(*_widened(operands))
            jax.block_until_ready(wanted)
        except jax.errors.JaxRuntimeError as error:
            self._failures |= dict.fromkeys(self._programs, f"its reference: {_first_line(error)}")
        else:
            for name, program in self._programs.items():
                try:
                    errors[name] = {k: float(x) for k, x in _relative_errors(program(*operands), wanted).items()}
                except jax.errors.JaxRuntimeError as error:
                    self._failures[name] = _first_line(error)
        seconds = {}
        if self._case.timed:
            calls = {name: lambda p=self._programs[name]: p(*operands) for name in errors}
            seconds = in_turns(calls)
        chosen = next((name for name in self._case.implementations if name not in self._refusals), None)
        return [
            Row(
                *self._place,
                implementation=name,
                shape=next(iter(self._case.activations.values())),
                limit=self._limit,
                errors=errors.get(name),
                seconds=seconds.get(name),
                chosen=name == chosen,
                refusal=self._refusals.get(name),
                failure=self._failures.get(name),
            )
            for name in self._case.implementations
        ]


def in_turns(calls: Mapping[str, Callable[[], Any]], seconds: float = 0.05, rounds: int = 3) -> dict[str, float]:
    """Median seconds of each call, made once before: calls are queued, and take turns of about so many seconds.

    Args:
        calls: what to time, by name; each returns arrays.
        seconds: length of a turn.
        rounds: turns of each.
    """

    def turn(call: Callable[[], Any], count: int) -> float:
        started = time.perf_counter()
        for _ in range(count - 1):
            call()
        jax.block_until_ready(call())
        return (time.perf_counter() - started) / count

    counts = {name: max(1, min(100, round(seconds / turn(call, 2)))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(turn(call, counts[name]))
    return {name: statistics.median(taken) for name, taken in times.items()}


def _lower(case: Case, dtype: str, function: Callable[..., Any]) -> tuple[Any, Any]:
    """Trace `(activations, weights, others, cotangent)` to output and gradients, and say what the output is."""

    def both_ways(activations: Any, weights: Any, others: Any, cotangent: Any) -> dict[str, Any]:
        output, pullback = jax.vjp(lambda a, w: function(**a, **w, **others), activations, weights)
        by_activations, by_weights = pullback(cotangent)
        several = isinstance(output, tuple)
        outputs = {f"output {i}": part for i, part in enumerate(output)} if several else {"output": output}
        return outputs | {f"d{name}": gradient for name, gradient in (by_activations | by_weights).items()}

    activations = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in case.activations.items()}
    weights = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in case.weights.items()}
    others = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in case.others.items()}
    output = jax.eval_shape(lambda a, w, o: function(**a, **w, **o), activations, weights, others)
    return jax.jit(both_ways).lower(activations, weights, others, output), output


def _draw(case: Case, dtype: str, output: Any) -> tuple[Any, ...]:
    """Operands and cotangent of a case: values of the precision."""
    count = len(case.activations) + len(case.weights) + len(jax.tree.leaves(output))
    keys = iter(jax.random.split(jax.random.key(0), count))

    def drawn(shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
        return (scale * jax.random.normal(next(keys), shape)).astype(dtype)

    activations = {name: drawn(shape) for name, shape in case.activations.items()}
    weights = {
        name: drawn(shape, shape[0] ** -0.5 if len(shape) > 1 else 1.0).astype(jnp.float32)
        for name, shape in case.weights.items()
    }
    others = {name: jnp.asarray(array) for name, array in case.others.items()}
    return activations, weights, others, jax.tree.map(lambda x: drawn(x.shape).astype(x.dtype), output)


def _widened(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values in float32."""
    activations, weights, others, cotangent = operands
    activations, weights, cotangent = jax.tree.map(lambda x: x.astype(jnp.float32), (activations, weights, cotangent))
    return activations, weights, others, cotangent


@jax.jit
def _relative_errors(got: dict[str, jax.Array], wanted: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def error(got: jax.Array, wanted: jax.Array) -> jax.Array:
        # Where the reference is all zeros, so must the result be.
        return jnp.linalg.norm(got.astype(jnp.float32) - wanted) / jnp.maximum(jnp.linalg.norm(wanted), 1e-30)

    return jax.tree.map(error, got, wanted)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
