"""A trace of a few steps, for TensorBoard's profile plugin (XProf): which operation of which layer took how long.

On a CPU, JAX's trace has only the names of compiled operations, so the layers they belong to are looked up in the
compiled program and added to the trace; XProf shows them in its Trace Viewer, and its other tools stay empty. What it
shows of a GPU's trace has not been tried.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count, groupby
from pathlib import Path

import jax
from jax.profiler import ProfileData

_FIRST, _STEPS = 5, 8
"""Steps before the trace (they still warm up), and steps in it."""

PLANE = "/device:CUSTOM:layers"
"""The plane of layers. XProf shows planes of this prefix when the trace has none of a GPU or TPU."""
_LONGEST_GAP = 100_000
"""Nanoseconds for which a thread may do something else within one event of a layer."""
_OF_JAX = re.compile(
    r"while|body|cond|branch_\w+|closed_call|checkpoint|remat\w*|shard_map|custom_[jv][jv]p_call|named_computation|eval_jaxpr|"
)
"""What JAX adds to the names of operations between the scopes that the model names."""

_PHASE = "offload/"
PHASES = ("device", "down", "update", "up")
"""What the host waits for in a step with its optimizer on the host; see `phases_of_a_step`."""


def phase(name: str) -> jax.profiler.TraceAnnotation:
    """A context that a trace shows as a phase of a step with its optimizer on the host.

    Args:
        name: one of `PHASES`, or `step` around all of them.
    """
    return jax.profiler.TraceAnnotation(_PHASE + name)


def phases_of_a_step(trace: Path) -> dict[str, float]:
    """What the host waited for in a mean step with its optimizer on the host, in seconds.

    At any time it waits for one thing, so that the phases add up to the step: `device`, the forward and backward pass,
    in which gradients go down; `down`, what is left to do for them; `update`, the host's optimizer; `up`, new weights
    that are not sent as fast as they are made; and `other`, what the host does between its waits. The last weights go
    up while the next step starts, whose `device` waits for them.

    Args:
        trace: an `.xplane.pb` file.

    Returns:
        Seconds by phase; empty where no such step was traced.
    """
    host = ProfileData.from_file(str(trace)).find_plane_with_name("/host:CPU")
    events = [event for line in (() if host is None else host.lines) for event in line.events]
    steps = [event for event in events if event.name == _PHASE + "step"]
    if not steps:
        return {}
    first, last = min(step.start_ns for step in steps), max(step.start_ns + step.duration_ns for step in steps)
    inside = [event for event in events if first <= event.start_ns < last]
    seconds = {
        name: sum(event.duration_ns for event in inside if event.name == _PHASE + name) / 1e9 / len(steps)
        for name in PHASES
    }
    whole = sum(step.duration_ns for step in steps) / 1e9 / len(steps)
    return seconds | {"other": whole - sum(seconds.values())}


def phases_in_words(seconds: Mapping[str, float]) -> str:
    """`phases_of_a_step` as a sentence; empty if they are."""
    if not seconds:
        return ""
    parts = ", ".join(f"{name} {own:.3g}" for name, own in seconds.items())
    return f"A step of {sum(seconds.values()):.3g} s waits for: {parts}."


class Profiler:
    """Traces some steps of a run, early on.

    Args:
        directory: the run directory: `tensorboard --logdir` of it shows the trace.
        program: gives the text of the compiled step, in which operations carry the names of their layers.
    """

    def __init__(self, directory: Path, program: Callable[[], str]):
        self._directory, self._program = directory, program
        self._settled = 0
        self._tracing = False

    def step_settled(self) -> str | None:
        """Count a step; start or stop the trace where it is time. Returns a sentence when the trace is written."""
        self._settled += 1
        if self._settled == _FIRST:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python functions would bury the operations
            jax.profiler.start_trace(str(self._directory), profiler_options=options)
            self._tracing = True
        elif self._settled == _FIRST + _STEPS:
            return self.stop()
        return None

    def stop(self) -> str | None:
        """Stop the trace, if one is running, and say where it is; or that the run was too short for one."""
        if self._settled < _FIRST:
            return f"nothing was traced: the trace begins after {_FIRST} steps, and the run took {self._settled}."
        if not self._tracing:
            return None
        self._tracing = False
        jax.profiler.stop_trace()
        newest = max(self._directory.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
        name_layers(newest, self._program)
        written = (
            f"profile of {self._settled - _FIRST} steps written: tensorboard --logdir {self._directory} "
            "(its Profile tab needs `pip install xprof`; layers are named in its Trace Viewer)."
        )
        return " ".join(filter(None, (written, phases_in_words(phases_of_a_step(newest)))))


@dataclass
class _Line:
    """What one thread did, by scope: nested events, and of each depth the one that is still growing."""

    name: str
    events: list[tuple[str, float, float]] = field(default_factory=list)
    _open: list[tuple[str, float, float]] = field(default_factory=list)
    _last: tuple[int, float] = (0, 0.0)

    def add(self, scopes: tuple[str, ...], run: int, start: float, end: float) -> None:
        """Add an operation, in order of start: it lengthens what is open of its scopes, and closes the rest."""
        same = 0
        if self._last[0] == run and start - self._last[1] < _LONGEST_GAP:
            while same < min(len(scopes), len(self._open)) and scopes[same] == self._open[same][0]:
                same += 1
        self.close(same, start)
        self._open = [(name, first, max(last, end)) for name, first, last in self._open]
        self._open += [(name, start, end) for name in scopes[same:]]
        self._last = run, max(end, self._last[1])

    def close(self, depth: int, before: float) -> None:
        """End every open event that is deeper, at the latest at some time."""
        self.events += [(name, first, min(last, before)) for name, first, last in self._open[depth:]]
        del self._open[depth:]


def name_layers(trace: Path, program: Callable[[], str]) -> None:
    """Add to a trace of a CPU which layers each thread worked on; any other trace is left as it is.

    Args:
        trace: an `.xplane.pb` file.
        program: gives the text of the traced program after compilation.
    """
    host = ProfileData.from_file(str(trace)).find_plane_with_name("/host:CPU")
    operations: list[tuple[float, float, dict, str]] = []
    for line in () if host is None else host.lines:
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" in stats and not event.name.startswith("end: "):
                operations.append((event.start_ns, event.start_ns + event.duration_ns, stats, line.name))
    if not operations:
        return
    text = program()
    module = re.match(r"HloModule ([\w.-]+)", text)
    scopes = dict(_scopes_of_operations(text))
    lines: dict[str, _Line] = {}
    for start, end, stats, thread in sorted(operations, key=lambda each: each[:2]):
        path = scopes.get(stats["hlo_op"])
        if path and module and stats["hlo_module"] == module[1]:
            lines.setdefault(thread, _Line(thread)).add(path, stats["run_id"], start, end)
    for line in lines.values():
        line.close(0, float("inf"))
    with trace.open("ab") as file:  # serialised messages add up by being put together
        file.write(ProfileData.text_proto_to_serialized_xspace(_plane(lines.values())))


def scopes_of(name: str) -> tuple[str, ...]:
    """The scopes, outermost first, of an operation of the compiled step.

    Args:
        name: what JAX calls the operation, such as `jit(step)/transpose(jvp(layer_0))/attention/dot_general`.

    Returns:
        The path up to each scope, such as `layer_0 (backward)` and `layer_0/attention (backward)`.
    """
    first = name.split(";")[0]  # of operations that became one
    words = re.sub(r"\bp?jit\([^()]*\)|\b\w+\(|\)", "", first).split("/")[:-1]
    words = [word for word in words if not _OF_JAX.fullmatch(word)]
    path = [word for word, _ in groupby(words)]  # rematerialisation names a layer twice
    direction = " (backward)" if "transpose(" in first else ""
    return tuple("/".join(path[: depth + 1]) + direction for depth in range(len(path)))


def _scopes_of_operations(text: str) -> Iterable[tuple[str, tuple[str, ...]]]:
    for operation, name in re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?\bop_name="([^"]+)"', text, re.MULTILINE):
        yield operation, scopes_of(name)


def _plane(lines: Iterable[_Line]) -> str:
    """A plane of a trace as text: `XSpace` of openxla/xla, `xla/tsl/profiler/protobuf/xplane.proto`."""
    ids: dict[str, int] = {}
    numbers = count(1)
    text = [f'name: "{PLANE}"']
    for number, line in enumerate(lines, 1):
        text.append(f"lines {{ id: {number} name: {json.dumps(line.name)}")
        for name, start, end in sorted(line.events, key=lambda event: (event[1], -event[2])):
            if name not in ids:
                ids[name] = next(numbers)
            text.append(
                f"events {{ metadata_id: {ids[name]} offset_ps: {round(1e3 * start)} "
                f"duration_ps: {round(1e3 * (end - start))} }}"
            )
        text.append("}")
    for name, number in ids.items():
        text.append(f"event_metadata {{ key: {number} value {{ id: {number} name: {json.dumps(name)} }} }}")
    return f"planes {{ {' '.join(text)} }}"
