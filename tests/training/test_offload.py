"""ZeRO-Offload against AdamW written out by hand, its transfers counted, and its state taken apart and put together."""

import itertools
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from cramjax.config import RunConfig
from cramjax.errors import RunError, RunInterruptedError
from cramjax.optim import make_optimizer
from cramjax.optim.groups import weight_decay
from cramjax.optim.schedule import schedule
from cramjax.parallel import batch_sharding, bytes_per_device
from cramjax.parallel import offload as placement
from cramjax.recipes import load_recipe
from cramjax.show.numbers import format_bytes
from cramjax.training import checkpoint, offload, resume, train
from cramjax.training.display import QuietDisplay
from cramjax.training.methods import step_program
from cramjax.training.metrics import read_records
from cramjax.training.offload import Offloaded, make_gradient
from cramjax.training.offload_state import Gradient, HostState, Layout, host_bytes
from cramjax.training.parts import Vocabulary, build_parts
from cramjax.training.program import Parts
from cramjax.training.step import Batch, State, initial_state, make_step

Tiny = Callable[..., RunConfig]
LENGTH = 12

# Rates per group, decay, clipping that bites, and a schedule that moves; epsilon is far above rounding errors of a
# gradient, which Adam would otherwise blow up to whole steps where the gradient is zero but for them.
_BASE = [
    "--model.layers=3", "--model.width=16", "--model.heads=2", "--model.mlp=24", "--model.activation=swiglu",
    "--model.norm=rmsnorm", "--model.tied=false", f"--data.sequence_length={LENGTH}",
    "--optim.name=adamw", "--optim.lr=0.01", "--optim.embed_lr=0.02", "--optim.head_lr=0.005", "--optim.eps=1e-4",
    "--optim.weight_decay=0.1", "--optim.clip=0.5", "--optim.schedule=cosine", "--batch.size=4",
    "--batch.microbatch=4", "--train.compute_dtype=float32", "--train.offload_optimizer=true",
    "--train.data_parallel=1", "--evaluate.batch=8",
]  # fmt: skip
_VOCABULARY = Vocabulary(50, separator_id=0, mask_id=1)
_FRACTIONS = [0.1, 0.2, 0.3, 0.5, 0.6, 0.8]


def configured(*overrides: str) -> RunConfig:
    return load_recipe("quickstart", [*_BASE, *(f"--{override}" for override in overrides)])


def started(config: RunConfig) -> tuple[Parts, Offloaded]:
    parts = build_parts(config, _VOCABULARY)
    return parts, step_program(config, parts).step.compile()


def batches(config: RunConfig, parts: Parts, count: int, microbatches: int = 1) -> list[Batch]:
    shape = config.batch.size // parts.microbatch, parts.microbatch, LENGTH + 1
    rows = jax.sharding.NamedSharding(parts.mesh, jax.P(None, *batch_sharding(parts.mesh).spec))
    rng = np.random.default_rng(0)
    return [
        Batch(jax.device_put(rng.integers(2, 50, shape, np.int32), rows), np.int32(microbatches))  # pyright: ignore
        for _ in range(count)
    ]


def stacked(parts: dict[str, Any]) -> Any:
    """Parts of the host's state as one tree of parameters."""
    blocks = [parts[name] for name in sorted(parts) if name.startswith("block_")]
    return {
        "embed": jax.tree.map(np.asarray, parts["embed"]),
        "blocks": jax.tree.map(lambda *p: np.stack(p), *blocks),
        "head": jax.tree.map(np.asarray, parts["head"]),
    }


def trained(config: RunConfig, fractions: list[float] = _FRACTIONS, microbatches: int = 1) -> tuple[State, list[Any]]:
    parts, step = started(config)
    state, metrics = step.create(), []
    for batch, fraction in zip(batches(config, parts, len(fractions), microbatches), fractions, strict=True):
        state, measured = step(state, batch, np.float32(fraction))
        metrics.append(jax.device_get(measured))
    return state, metrics


def by_hand(config: RunConfig, fractions: list[float] = _FRACTIONS, microbatches: int = 1) -> tuple[Any, list[float]]:
    """AdamW in float64, of the gradients that JAX takes of the whole loss in float32 at once; as the paper delays it.

    What crosses the bus is rounded to `train.param_dtype`.
    """
    parts, step = started(config)
    optim, dtype = config.optim, config.train.param_dtype
    master = jax.tree.map(np.float64, stacked(jax.device_get(step.create().optimizer.master)))
    first, second = (jax.tree.map(np.zeros_like, master) for _ in range(2))
    weights = parts.model.weights
    rates = jax.tree.map(lambda weight: {"embedding": 0.02, "head": 0.005}.get(weight.role, 0.01), weights)
    decays = jax.tree.map(lambda weight: weight_decay(optim, weight.role), weights)
    pending, norms, updates = None, [], 0

    def crossed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32).astype(dtype), tree)

    def gradient(weights: Any, tokens: Any, fraction: float) -> Any:
        loss = parts.loss_function(weights, tokens, None, jnp.float32(fraction), True)
        return loss.total / loss.tokens

    def exact(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def apply(gradient: Any, fraction: float) -> None:
        nonlocal master, first, second, updates
        updates += 1
        norm = math.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(gradient)))
        gradient = jax.tree.map(lambda g: g * min(1.0, optim.clip / norm), gradient)
        first = jax.tree.map(lambda m, g: optim.beta1 * m + (1 - optim.beta1) * g, first, gradient)
        second = jax.tree.map(lambda v, g: optim.beta2 * v + (1 - optim.beta2) * g**2, second, gradient)
        multiplier = float(schedule(optim)(fraction))

        def moved(p: Any, m: Any, v: Any, rate: float, decay: float) -> Any:
            m, v = m / (1 - optim.beta1**updates), v / (1 - optim.beta2**updates)
            return p - rate * multiplier * (m / (np.sqrt(v) + optim.eps) + decay * p)

        master = jax.tree.map(moved, master, first, second, rates, decays)

    weights = crossed(master)
    for batch, fraction in zip(batches(config, parts, len(fractions), microbatches), fractions, strict=True):
        each = [
            jax.tree.map(np.float64, crossed(jax.grad(gradient)(exact(weights), tokens, fraction)))
            for tokens in batch.tokens[:microbatches]
        ]
        own = jax.tree.map(lambda *g: sum(g) / len(g), *each)
        norms.append(math.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(own))))
        if pending is not None:
            apply(pending, fraction)
            pending = None
        if config.train.delay_update is not None and fraction >= config.train.delay_update:
            pending = own
        else:
            apply(own, fraction)
        weights = crossed(master)
    return master, norms


def assert_close(state: State, master: Any, tolerance: float) -> None:
    found = stacked(jax.device_get(state.optimizer.master))
    gaps = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).ravel(), found, master))
    assert np.mean(np.concatenate(gaps)) <= tolerance / 20
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(master), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


# Six steps of 0.02 in float32: 1e-4 of their length, for gates' gradients are sums that nearly cancel, and on average a
# twentieth of it. In bfloat16 a gradient that lies between two numbers may go up in one and down in the other, which is
# 2^-8 of it, and a few times that where gradients of tokens, which are rounded first, nearly cancel.
_TOLERANCE = {"float32": 1e-4 * 0.02 * 6, "bfloat16": 2**-6 * 0.02 * 6}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("delay", [None, 0.0, 0.4])
def test_it_equals_adamw_written_out_with_and_without_delay(dtype: str, delay: float | None) -> None:
    delayed = [] if delay is None else [f"train.delay_update={delay}"]
    config = configured(f"train.param_dtype={dtype}", *delayed)
    state, metrics = trained(config)
    master, norms = by_hand(config)
    assert_close(state, master, _TOLERANCE[dtype])
    np.testing.assert_allclose([m.grad_norm for m in metrics], norms, rtol=1e-5 if dtype == "float32" else 2**-8)
    assert bool(state.optimizer.pending) == (delay is not None)
    rounded = jax.tree.map(lambda p: np.asarray(jnp.asarray(p).astype(dtype)), stacked(state.optimizer.master))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), jax.device_get(state.params), rounded))


@pytest.mark.slow
def test_it_equals_the_step_without_offload() -> None:
    config = configured(
        "train.param_dtype=float32",
        "model.tied=true",
        "model.adaptive_head=[]",
        "optim.head_lr=null",
        "model.value_embeddings=true",
    )
    parts, _ = started(config)
    step = jax.jit(make_step(parts.loss_function, parts.optimizer))
    state = initial_state(parts.model.init(jax.random.key(config.seed)), parts.optimizer, config.seed)
    for batch, fraction in zip(batches(config, parts, len(_FRACTIONS)), _FRACTIONS, strict=True):
        state, expected = step(state, batch, np.float32(fraction))
    offloaded, metrics = trained(config)
    assert_close(offloaded, jax.device_get(state.params), _TOLERANCE["float32"])
    for a, b in zip(metrics[-1], expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)  # float32, after six steps


@pytest.mark.slow
@pytest.mark.parametrize("delay", [None, 0.4])
@pytest.mark.parametrize("microbatches", [1, 3])  # of three: a batch that still grows, and a full one
def test_microbatches_are_summed_on_the_host(delay: float | None, microbatches: int) -> None:
    delayed = [] if delay is None else [f"train.delay_update={delay}"]
    overrides = ("batch.size=12", "batch.ramp=0.5", "train.param_dtype=float32", *delayed)
    state, metrics = trained(configured(*overrides), microbatches=microbatches)
    master, norms = by_hand(configured(*overrides), microbatches=microbatches)
    assert_close(state, master, _TOLERANCE["float32"])
    np.testing.assert_allclose([m.grad_norm for m in metrics], norms, rtol=1e-5)


@pytest.mark.slow
def test_the_masked_objective_with_dropout_trains_alike() -> None:
    config = configured(
        "objective.kind=masked", "model.dropout=0.1", "train.param_dtype=float32", "evaluate.samples=[]"
    )
    parts, step = started(config)
    state, plain = step.create(), initial_state(parts.model.init(jax.random.key(0)), parts.optimizer, config.seed)
    batch = batches(config, parts, 1)[0]
    batch = batch._replace(tokens=batch.tokens[:, :, :LENGTH])
    plain, expected = jax.jit(make_step(parts.loss_function, parts.optimizer))(plain, batch, np.float32(0.5))
    state, metrics = step(state, batch, np.float32(0.5))
    np.testing.assert_allclose(metrics.grad_norm, expected.grad_norm, rtol=1e-5)
    assert_close(state, jax.device_get(plain.params), _TOLERANCE["float32"])


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (1, 8), (2, 4), (4, 2)])
def test_host_bytes_are_those_of_all_devices(data: int, fsdp: int) -> None:
    config = configured(f"train.data_parallel={data}", f"train.fsdp={fsdp}", "batch.size=8", "batch.microbatch=8")
    parts = build_parts(config, _VOCABULARY)
    state = Layout(config, parts.model, parts.mesh).state.optimizer
    there = data * fsdp * bytes_per_device((state.master, state.moments))
    told = host_bytes(config, parts.parameters, copies=data)
    # Norms and counters are on every device, whole.
    assert told["weights"] + told["optimizer"] == pytest.approx(there, rel=0.02 * fsdp)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), (1, 8)])
def test_eight_devices_give_what_one_gives(data: int, fsdp: int) -> None:
    overrides = ("batch.size=16", "batch.microbatch=8", "train.param_dtype=float32", "train.delay_update=0.4")
    one, _ = trained(configured(*overrides), microbatches=2)
    many, _ = trained(configured(*overrides, f"train.data_parallel={data}", f"train.fsdp={fsdp}"), microbatches=2)
    assert_close(many, stacked(one.optimizer.master), _TOLERANCE["float32"])
    kernels = {
        "weights": many.params["blocks"]["mlp"]["up"]["kernel"],
        "master": many.optimizer.master["block_001"]["mlp"]["up"]["kernel"],
        "moments": many.optimizer.moments["block_001"].transform[1][0].mu["blocks"]["mlp"]["up"]["kernel"],
        "gradient": many.optimizer.gradient["blocks"]["mlp"]["up"]["kernel"],
    }
    for name, kernel in kernels.items():
        assert math.prod(kernel.addressable_shards[0].data.shape) * fsdp == kernel.size, name


def test_places_and_precisions_of_a_state() -> None:
    config = configured("train.param_dtype=bfloat16", "train.delay_update=0")
    parts, step = started(config)
    state = step.create()
    host: HostState = state.optimizer
    assert {x.dtype for x in jax.tree.leaves((state.params, host.gradient))} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(host.master)} == {jnp.dtype("float32")}
    assert {d.platform for x in jax.tree.leaves(host) for d in x.devices()} == {"cpu"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, step.like)
    made = step._programs["gradient"](
        state.params, state.step, state.key, batches(config, parts, 1)[0].tokens, np.int32(0), np.float32(0)
    )
    assert {x.sharding.memory_kind for x in jax.tree.leaves(made.values)} == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves((made.norm, made.loss))} == {"device"}


@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_first_weights_are_those_of_the_model(tied: str) -> None:
    overrides = ("model.adaptive_head=[]", "optim.head_lr=null", "train.param_dtype=bfloat16", "seed=7")
    config = configured(f"model.tied={tied}", *overrides)
    parts, step = started(config)
    state = step.create()
    expected = jax.jit(replace(parts.model, param_dtype="float32").init)(jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, stacked(state.optimizer.master), expected)
    rounded = jax.tree.map(lambda p: p.astype("bfloat16"), expected)
    jax.tree.map(np.testing.assert_array_equal, state.params, rounded)
    begun = make_optimizer(config.optim, parts.model.weights).init(expected)

    def moments(tree: Any) -> list[Any]:
        return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]

    assert sum(x.size for x in moments(state.optimizer.moments)) == sum(x.size for x in moments(begun))
    assert not any(np.any(x) for x in jax.tree.leaves((state.optimizer.moments, begun)))


def test_creation_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_SECONDS_BETWEEN_MESSAGES", 0.0)
    _, step = started(configured())
    told: list[str] = []
    state = step.create(told.append)
    assert "of host memory" in told[0]
    shares = [int(re.match(r"(\d+)%", message)[1]) for message in told[1:]]  # pyright: ignore[reportOptionalSubscript]
    # Nothing is there before the first part, and each of the three blocks, the head and the embedding adds its own.
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 100 and len(set(shares)) == 6
    assert format_bytes(sum(x.nbytes for x in jax.tree.leaves(state.optimizer[:2]))) in told[0]


def test_an_update_is_under_way_while_the_one_before_is_sent() -> None:
    begun: list[int] = []

    def updates() -> Iterator[Any]:
        for number in range(4):
            begun.append(number)
            yield number

    assert [(item, len(begun)) for item in offload._one_ahead(updates())] == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(offload._one_ahead([])) == []


@pytest.mark.slow
@pytest.mark.parametrize("delay", [None, 0.0])
def test_a_profile_says_what_the_host_waited_for(tiny: Tiny, tmp_path: Path, delay: float | None) -> None:
    config = tiny(
        optim__name="adamw",
        train__offload_optimizer=True,
        train__param_dtype="bfloat16",
        train__delay_update=delay,
        train__profile=True,
    )
    run = train(config, tmp_path / "run")
    (trace,) = (tmp_path / "run" / "plugins" / "profile").glob("*/*.xplane.pb")
    host = ProfileData.from_file(str(trace)).find_plane_with_name("/host:CPU")
    events = [event for line in host.lines for event in line.events if event.name.startswith("offload/")]
    steps = sorted((e.start_ns, e.start_ns + e.duration_ns) for e in events if e.name == "offload/step")
    waits = sorted((e.start_ns, e.start_ns + e.duration_ns) for e in events if e.name != "offload/step")
    assert len(steps) == 8 and len({e.name for e in events}) == 5
    # One thread waits for one thing at a time, and always within a step. (1 ns: rounding.)
    assert all(before[1] <= after[0] + 1 for before, after in itertools.pairwise(waits))
    assert all(any(a - 1 <= start and end <= b + 1 for a, b in steps) for start, end in waits)
    phases = run.profile().phases
    assert list(phases) == ["device", "down", "update", "up", "other"] and min(phases.values()) > 0
    assert sum(phases.values()) == pytest.approx(sum(b - a for a, b in steps) / 8e9, rel=1e-9)
    (message,) = (r["message"] for r in read_records(run.path) if r.get("name") == "profile")
    assert "waits for: device" in message and str(run.profile()).endswith(message.partition("Trace Viewer). ")[2])
    assert "waiting for" in run.profile()._repr_html_()


def sent_to_host(jaxpr: jex.Jaxpr, times: int = 1) -> int:
    """Bytes of values that a program copies to host memory; those of a loop's body count at every turn."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "device_put" and equation.params["devices"][0] == jax.memory.Space.Host:
            made_by = next((e for e in jaxpr.eqns if equation.invars[0] in e.outvars), None)
            if made_by is None or made_by.primitive.name != "empty":  # nothing is copied into a new buffer
                total += times * equation.invars[0].aval.size * equation.invars[0].aval.dtype.itemsize  # pyright: ignore
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, jex.ClosedJaxpr)):
            if isinstance(inner, jex.ClosedJaxpr):
                assert equation.primitive.name != "while", "a loop of unknown length"
                total += sent_to_host(inner.jaxpr, times * equation.params.get("length", 1))
    return total


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize("delay", [None, 0.0])
def test_a_parameter_crosses_the_bus_once_down_and_once_up(
    dtype: str, width: int, delay: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    delayed = [] if delay is None else [f"train.delay_update={delay}"]
    config = configured(f"train.param_dtype={dtype}", *delayed)
    parts, step = started(config)
    state, batch = step.create(), batches(config, parts, 1)[0]
    down, up, moved = 0, 0, placement.move

    def counted(tree: Any, shardings: Any) -> Any:
        nonlocal down, up
        size = sum(x.nbytes for x in jax.tree.leaves(tree))
        if isinstance(tree, Gradient):
            down += size
        else:
            up += size
        return moved(tree, shardings)

    monkeypatch.setattr(offload, "move", counted)
    for steps in range(1, 4):
        state, _ = step(state, batch, np.float32(0.5))
        applied = steps if delay is None else steps - 1
        parameters = sum(p.size for p in jax.tree.leaves(state.params))
        assert (down, up) == (
            steps * (width * parameters + 4 * 6),
            applied * width * parameters,
        )  # 6: norm and loss sums
    gradient = make_gradient(config, parts.loss_function)  # pyright: ignore[reportArgumentType]
    program = jax.make_jaxpr(gradient)(state.params, state.step, state.key, batch.tokens, 0, 0.5)
    assert sent_to_host(program.jaxpr) == width * parameters


@pytest.mark.parametrize("delay", [None, 0.3])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, delay: float | None) -> None:
    delayed = [] if delay is None else [f"train.delay_update={delay}"]
    config = configured("train.param_dtype=bfloat16", *delayed)
    parts, step = started(config)
    state = step.create()
    meta = checkpoint.Meta(0, 0, {}, "", "", 0.0, "", None)
    for number, (batch, fraction) in enumerate(zip(batches(config, parts, 6), _FRACTIONS, strict=True)):
        state, _ = step(state, batch, np.float32(fraction))
        writer = checkpoint.CheckpointWriter(tmp_path, keep=10)
        writer.save(state, replace(meta, step=number))
        writer.wait()
    whole = jax.device_get(state)
    for number, path in enumerate(checkpoint.list_checkpoints(tmp_path)):
        state = checkpoint.restore(path, step.like)
        assert bool(state.optimizer.pending) == (delay is not None and _FRACTIONS[number] >= delay)
        for batch, fraction in list(zip(batches(config, parts, 6), _FRACTIONS, strict=True))[number + 1 :]:
            state, _ = step(state, batch, np.float32(fraction))
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(jax.device_get(state)), strict=True):
            np.testing.assert_array_equal(a, b)


class StopAt(QuietDisplay):
    """Sends this process SIGTERM when a record of the given step is shown."""

    def __init__(self, step: int):
        super().__init__()
        self.step, self.sent = step, False

    def record(self, record: Any) -> None:
        if record["kind"] == "train" and record["step"] >= self.step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_run_trains_stops_and_resumes(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(
        optim__name="adamw", train__offload_optimizer=True, train__param_dtype="bfloat16", train__delay_update=0.4
    )
    whole = train(config, tmp_path / "whole")
    for number in (5, 15):
        with pytest.raises(RunInterruptedError, match="--resume"):
            if number == 5:
                train(config, tmp_path / "parts", display=StopAt(number))
            else:
                resume(tmp_path / "parts", display=StopAt(number))
    again = resume(tmp_path / "parts")
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.summary["bits_per_byte"] == whole.summary["bits_per_byte"]
    plain = train(tiny(optim__name="adamw"), tmp_path / "plain")
    # Rounded weights, and half of the steps with gradients of the weights before: it learns about as much.
    assert again.summary["loss"] == pytest.approx(plain.summary["loss"], rel=0.1)


def test_devices_without_host_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "PINNED", "mapped_host")
    with pytest.raises(RunError, match="needs devices with mapped_host memory, and cpu has device, pinned_host"):
        started(configured())
