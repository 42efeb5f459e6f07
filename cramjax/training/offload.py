"""ZeRO-Offload (Ren et al. 2021, arXiv:2101.06840): float32 weights and moments on the host, which updates them.

The device walks forward and back with rounded weights, and sends each block's gradient to pinned host memory as soon as
it exists. A program of the CPU backend (why: `cramjax.parallel.offload`) then updates block by block in place, and the
new weights of one go up while the next is computed; not before the last gradient is there, since clipping needs the
norm of all. Per parameter and step that is one number of `train.param_dtype` down and one up: 2 bytes each for
bfloat16. What lies where: `cramjax.training.offload_state`. What a step waits for: `cramjax.training.profile`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from cramjax.config import RunConfig
from cramjax.model import Loss, Objective, width_ratio
from cramjax.optim import Optimizer, schedule
from cramjax.optim.groups import peak_rate
from cramjax.parallel import on_mesh, one_layer, param_shardings, replicated
from cramjax.parallel.offload import host_buffer, move, pinned, to_host
from cramjax.show.numbers import format_bytes
from cramjax.training import whole
from cramjax.training.offload_state import (
    Gradient,
    HostState,
    Layout,
    Sums,
    block_like,
    device_params,
    host_bytes,
    placed,
    places_of,
)
from cramjax.training.profile import phase
from cramjax.training.program import Method, Parts, Program
from cramjax.training.step import Batch, DeviceProgram, State, StepMetrics
from cramjax.training.walk import Visitor, backward, forward

_IN_FLIGHT = 2
"""Blocks whose new weights are on the device before they are in their place."""

_SECONDS_BETWEEN_MESSAGES = 5.0

Progress = Callable[[str], object]
"""Is told how far something is, in a sentence."""

_Updated = tuple[str, PyTree, PyTree, PyTree]
"""A part after an update: its name, float32 weights, moments, and weights for the device."""


def make_gradient(config: RunConfig, objective: Objective, shardings: PyTree | None = None) -> Callable[..., Gradient]:
    """The device's share of a step: `(params, step, key, tokens, index, fraction) -> Gradient` of one microbatch.

    Args:
        config: the run.
        objective: its loss.
        shardings: how parameters are divided over devices; None: they are not.
    """
    dtype = jnp.dtype(config.train.param_dtype)
    divided = {} if shardings is None else shardings | {"blocks": jax.tree.map(one_layer, shardings["blocks"])}

    def leave(part: str, gradients: PyTree) -> tuple[PyTree, Array]:
        """Round gradients and send them to the host; and the sum of their squares."""
        rounded = jax.tree.map(lambda g: g.astype(dtype), gradients)
        if divided:
            rounded = jax.lax.with_sharding_constraint(rounded, divided[part])
        squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(rounded)]
        return jax.tree.map(to_host, rounded), sum(squares, jnp.zeros(()))

    def gradient(params: PyTree, step: Array, key: Array, tokens: Array, index: Array, fraction: Array) -> Gradient:
        rng = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), step), index)

        def read(carry: Any, layer: Array) -> PyTree:
            del carry
            return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, layer, keepdims=False), params["blocks"])

        def block(layer: Array, _: PyTree, gradients: PyTree, carry: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
            values, squares = carry
            sent, more = leave("blocks", gradients)
            blocks = jax.tree.map(
                lambda buffer, g: jax.lax.dynamic_update_index_in_dim(buffer, g, layer, 0), values["blocks"], sent
            )
            return values | {"blocks": blocks}, squares + more

        def outer(part: str, gradients: PyTree, carry: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
            sent, more = leave(part, gradients)
            return carry[0] | {part: sent}, carry[1] + more

        trace = forward(objective, params, tokens[index], rng, fraction, remat=config.train.remat)
        buffers = {"blocks": jax.tree.map(lambda p: host_buffer(p.shape, dtype), params["blocks"])}
        carry = (buffers, jnp.zeros(()))
        loss, (values, squares) = backward(objective, trace, params, Visitor(read, block, outer), carry)
        return Gradient(values, jnp.sqrt(squares), loss)

    return gradient


def device_program(config: RunConfig, objective: Objective, mesh: Mesh, batch: Batch) -> DeviceProgram:
    """What the device runs in a step, ready to be traced.

    Args:
        config: the run.
        objective: its loss.
        mesh: the devices.
        batch: shape and place of a step's sequences.
    """
    like = device_params(config, objective.model)
    shardings, everywhere = param_shardings(mesh, like, objective.model.weights), replicated(mesh)
    step, key = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
        for shape, dtype in (((), jnp.int32), ((2,), jnp.uint32))
    )
    index, fraction = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((), np.float32)
    function = on_mesh(mesh, make_gradient(config, objective, None if mesh.size == 1 else shardings))
    arguments = (placed(like, shardings), step, key, batch.tokens, index, fraction)
    return DeviceProgram(function, arguments, Gradient(pinned(shardings), everywhere, everywhere))  # pyright: ignore


class Offloaded:
    """Training with the optimizer on the host: the state, and the step `(state, batch, fraction) -> (state, metrics)`.

    Made, its programs are traced; a step is taken by what `compile` returns.

    From `train.delay_update` on (section 5.2 of the paper), a step applies the gradient of the step before it, while
    the device computes its own: the first such step applies none, and the last gradient of a run is never applied. A
    delayed update has the rate of the step that applies it.

    Args:
        config: the run.
        parts: what it is made of.
        batch: shape and place of a step's sequences.

    Raises:
        RunError: the devices have no host memory that they can write, or no CPU devices beside them.
    """

    def __init__(self, config: RunConfig, parts: Parts, batch: Batch):
        self._config, self._model = config, replace(parts.model, param_dtype="float32")
        self.layout = layout = Layout(config, parts.model, parts.mesh)
        self._delay = 2.0 if config.train.delay_update is None else config.train.delay_update
        like, host, everywhere = layout.state, layout.state.optimizer, replicated(parts.mesh)
        number, fraction = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((), np.float32)
        norm, sums, place = layout.on_host(jnp.float32), layout.sums, replicated(layout.host)
        self._received = Gradient(places_of(layout.sent), place, Loss(*[place] * len(Loss._fields)))  # pyright: ignore

        programs = {"gradient": device_program(config, parts.loss_function, parts.mesh, batch)}
        for name in ("embed", next(iter(layout.layer)), "head"):  # one block stands for all
            kind, own = layout.kind(name), (host.master[name], host.moments[name])
            programs[kind] = DeviceProgram(
                _updater(kind, layout.optimizers[kind], layout.dtype),
                (*own, layout.gradient[kind], number, fraction, norm),
                places_of((*own, layout.weights[name])),
                donate=(0, 1),
            )
        blocks = like.params["blocks"]
        self._of_block = places_of(block_like(blocks))
        write = DeviceProgram(
            write_block, (blocks, block_like(blocks), number), (places_of(blocks), everywhere), donate=(0,)
        )
        self._write = write.lower(config.budget).compile()  # the first state needs it too
        programs["advance"] = DeviceProgram(lambda step: step + 1, (like.step,), everywhere)
        programs["summary"] = DeviceProgram(_summary(config), (sums.loss, norm, fraction), place)
        if batch.tokens.shape[0] > 1:
            sent = layout.sent, sums.loss
            programs["first"] = DeviceProgram(_weighed, sent, places_of(sums))
            programs["add"] = DeviceProgram(_added, (sums, *sent), places_of(sums), donate=(0,))
            mean = Gradient(places_of(sums.values), place, place)  # pyright: ignore[reportArgumentType]
            programs["mean"] = DeviceProgram(_mean, (sums,), mean, donate=(0,))
        self._programs: dict[str, Any] = {name: program.lower(config.budget) for name, program in programs.items()}

    def compile(self) -> "Offloaded":
        """The same, with its programs compiled."""
        compiled = copy(self)
        compiled._programs = {name: program.compile() for name, program in self._programs.items()}
        return compiled

    @property
    def like(self) -> State:
        """Shapes and places of a state."""
        return self.layout.state

    def as_text(self) -> str:
        """The device's program, optimised."""
        return self._programs["gradient"].as_text()

    def memory_analysis(self) -> Any:
        """The compiler's bytes of the device's program."""
        return self._programs["gradient"].memory_analysis()

    def cost_analysis(self) -> Any:
        """The compiler's FLOPs and bytes accessed of the device's program."""
        return self._programs["gradient"].cost_analysis()

    def create(self, progress: Progress | None = None) -> State:
        """The state before the first step. The devices draw one part after the other, and the host takes it in.

        Args:
            progress: is told, every few seconds, how much of the state is there.
        """
        host, key = self.like.optimizer, jax.random.key(self._config.seed)
        empty = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding),
            self.like._replace(optimizer=host._replace(master={}, moments={})),
        )
        params, filled = self._place(empty.params, empty.optimizer, self._drawn(key, progress))
        key_data = jax.device_put(jax.random.key_data(key), self.like.key.sharding)
        return State(empty.step, params, filled, key_data)

    def _drawn(self, key: Array, progress: Progress | None) -> Iterator[_Updated]:
        """Every part as after an update, but with weights that are on the devices already."""
        layout, host = self.layout, self.like.optimizer
        programs = {kind: self._drawing(kind) for kind in layout.optimizers}
        count = _Count(progress, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((host.master, host.moments))))
        before: Any = ()
        for name in layout.order:
            draw, start = programs[layout.kind(name)]
            master, weights = draw(key, np.int32(layout.layer.get(name, 0)))
            arrived = move(master, places_of(host.master[name]))  # while the host fills the moments of the part before
            count.add(jax.block_until_ready(before))
            before = start(arrived)
            yield name, *before, weights
        count.add(jax.block_until_ready(before))

    def _drawing(self, kind: str) -> tuple[Any, Any]:
        """Programs that make a part: `(key, layer) -> (float32 weights, weights)` on the devices, and `float32 weights
        -> (float32 weights, moments)` on the host.
        """
        model, layout, host = self._model, self.layout, self.like.optimizer
        name = next(iter(layout.layer)) if kind == "blocks" else kind
        there = self._of_block if kind == "blocks" else layout.shardings[kind]

        def draw(key: Array, layer: Array) -> tuple[PyTree, PyTree]:
            master = model.init_block(key, layer) if kind == "blocks" else model.init(key)[kind]
            return master, _rounded(master, layout.dtype)

        def start(master: PyTree) -> tuple[PyTree, PyTree]:
            # What has arrived may be memory that is not the CPU backend's own: no update could take its place.
            return jax.tree.map(jnp.copy, master), layout.optimizers[kind].init({kind: master})

        return (
            jax.jit(draw, out_shardings=(there, there)),
            jax.jit(start, out_shardings=places_of((host.master[name], host.moments[name]))),
        )

    def __call__(self, state: State, batch: Batch, fraction: np.float32) -> tuple[State, StepMetrics]:
        """Take a step; the old state is consumed. It returns once the last weights are on their way up.

        Args:
            state: from `create`, a step, or a checkpoint.
            batch: the sequences.
            fraction: share of the budget that is spent when the step has ended.
        """
        with phase("step"):
            return self._step(state, batch, fraction)

    def _step(self, state: State, batch: Batch, fraction: np.float32) -> tuple[State, StepMetrics]:
        # Every wait is one that handing an array from one backend to the other would make, made where it has a name.
        params, host, run = state.params, state.optimizer, self._programs
        pending, delayed = bool(host.pending), float(fraction) >= self._delay
        sums, made, updates = None, None, []
        for index in range(int(batch.count)):
            sent = run["gradient"](params, state.step, state.key, batch.tokens, np.int32(index), fraction)
            if index == 0 and pending:  # the host has something to do meanwhile
                updates = list(self._updates(host, host.gradient, host.norm, fraction))
            if sums is not None:
                with phase("update"):
                    jax.block_until_ready(sums.loss)  # no more than two gradients wait in host memory
            with phase("device"):
                jax.block_until_ready(sent)
            with phase("down"):
                made = move(sent, self._received)
            if "add" in run:
                share = made.values, made.loss
                sums = run["first"](*share) if sums is None else run["add"](sums, *share)
            del sent
        if sums is not None:
            made = run["mean"](sums)
        assert made is not None, "a batch holds at least one microbatch"
        metrics = run["summary"](made.loss, made.norm, fraction)
        params, host = self._place(params, host, updates)
        if delayed:
            host = host._replace(gradient=made.values, norm=made.norm, pending=self._flag(True))
        else:
            params, host = self._place(params, host, self._updates(host, made.values, made.norm, fraction))
            host = host._replace(pending=self._flag(False))
        return State(run["advance"](state.step), params, host, state.key), metrics

    def _updates(self, host: HostState, gradient: PyTree, norm: Array, fraction: np.float32) -> Iterator[_Updated]:
        """Have the host update one part after the other, as the iterator is read."""
        for name in self.layout.order:
            kind, layer = self.layout.kind(name), np.int32(self.layout.layer.get(name, 0))
            update = self._programs[kind]
            yield name, *update(host.master[name], host.moments[name], gradient[kind], layer, fraction, norm)

    def _place(self, params: PyTree, host: HostState, updates: Iterable[_Updated]) -> tuple[PyTree, HostState]:
        """Take in updated parts, and send their weights to where the old ones are."""
        layout, params = self.layout, dict(params)
        master, moments = dict(host.master), dict(host.moments)
        written: deque[Array] = deque()
        for name, *own, weights in _one_ahead(updates):
            master[name], moments[name] = own
            with phase("update"):
                jax.block_until_ready(weights)
            with phase("up"):
                if name not in layout.layer:
                    params[name] = move(weights, layout.shardings[name])
                    continue
                if len(written) == _IN_FLIGHT:  # what is sent takes memory of the device at once, and may wait long
                    jax.block_until_ready(written.popleft())
                weights = move(weights, self._of_block)
                params["blocks"], layer = self._write(params["blocks"], weights, np.int32(layout.layer[name]))
                written.append(layer)
        return params, host._replace(master=master, moments=moments)

    def _flag(self, value: bool) -> Any:
        return jax.device_put(np.bool_(value), self.like.optimizer.pending.sharding)


def _one_ahead(updates: Iterable[_Updated]) -> Iterator[_Updated]:
    """The same, each once the next is under way: so the host need not wait while one is sent."""
    before: list[_Updated] = []
    for update in updates:
        yield from before
        before = [update]
    yield from before


class _Count:
    """Tells, every few seconds, how much of the host's share of a state is there.

    Args:
        progress: is told; None: nobody is.
        whole: bytes of all of it.
    """

    def __init__(self, progress: Progress | None, whole: int):
        self._progress, self._whole, self._done = progress, whole, 0
        self._told = time.monotonic()
        if progress is not None:
            progress(
                f"weights are drawn on the device; with the optimizer's state they take {format_bytes(whole)} of host "
                "memory."
            )

    def add(self, tree: PyTree) -> None:
        """Count arrays that are there."""
        self._done += sum(x.nbytes for x in jax.tree.leaves(tree))
        if self._progress is not None and time.monotonic() >= self._told + _SECONDS_BETWEEN_MESSAGES:
            self._told = time.monotonic()
            self._progress(f"{self._done / self._whole:.0%} of {format_bytes(self._whole)} in host memory.")


def _updater(kind: str, optimizer: Optimizer, dtype: Any) -> Callable[..., tuple[PyTree, PyTree, PyTree]]:
    """The host's share of a step, of a part: `(master, moments, gradient, layer, fraction, norm) -> (master, moments,
    weights for the device)`. Gradients of blocks come stacked.
    """

    def update(
        master: PyTree, moments: PyTree, gradient: PyTree, layer: Array, fraction: Array, norm: Array
    ) -> tuple[PyTree, PyTree, PyTree]:
        if kind == "blocks":
            gradient = jax.tree.map(lambda g: jax.lax.dynamic_index_in_dim(g, layer, keepdims=False), gradient)
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
        updated, moments, _ = optimizer.update({kind: gradient}, moments, {kind: master}, fraction, norm=norm)
        return updated[kind], moments, _rounded(updated[kind], dtype)

    return update


def _summary(config: RunConfig) -> Callable[[Loss, Array, Array], StepMetrics]:
    """Metrics of a step: `(loss sums, norm of the gradient, fraction) -> StepMetrics`."""
    multiplier = schedule(config.optim)
    rate = peak_rate(config.optim, "matrix", width_ratio(config.model))

    def summary(loss: Loss, norm: Array, fraction: Array) -> StepMetrics:
        mean = loss.nll / loss.tokens
        return StepMetrics(
            loss=mean,
            accuracy=loss.correct / loss.tokens,
            grad_norm=norm,
            lr=multiplier(fraction) * rate,
            finite=jnp.isfinite(mean) & jnp.isfinite(norm),
        )

    return summary


def write_block(blocks: PyTree, one: PyTree, layer: Array) -> tuple[PyTree, Array]:
    """Put a block into the stack, and say when it is there."""
    return jax.tree.map(lambda b, x: jax.lax.dynamic_update_index_in_dim(b, x, layer, 0), blocks, one), layer


def _weighed(gradient: PyTree, loss: Loss) -> Sums:
    """The first microbatch's share of a sum."""
    return Sums(jax.tree.map(lambda g: loss.tokens * g.astype(jnp.float32), gradient), loss)


def _added(sums: Sums, gradient: PyTree, loss: Loss) -> Sums:
    """A sum with another microbatch's share."""
    return jax.tree.map(jnp.add, sums, _weighed(gradient, loss))


def _mean(sums: Sums) -> Gradient:
    """The gradient of the mean loss per predicted token over all microbatches."""
    values = jax.tree.map(lambda g: g / sums.loss.tokens, sums.values)
    return Gradient(values, optax.tree.norm(values), sums.loss)


def _rounded(tree: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def _program(config: RunConfig, parts: Parts, batch: Batch) -> Program:
    offloaded = Offloaded(config, parts, batch)
    return Program(offloaded, offloaded.like, offloaded.create, batch, parts)


METHOD = Method(
    optimizer=whole.METHOD.optimizer,
    state_like=lambda config, model, optimizer, mesh: Layout(config, model, mesh).state,
    program=_program,
    device_program=lambda config, parts, batch: device_program(config, parts.loss_function, parts.mesh, batch),
    evaluation_params=lambda state, optimizer: state.params,
    on_host=True,
    host_bytes=host_bytes,
)
