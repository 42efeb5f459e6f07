"""The training step of a configuration on a mesh, from sizes alone: what a run compiles, and the planner with it.

Runs and plans ask for the same programs, so that what a plan has compiled and timed is in the cache when a run starts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from cramjax.config import RunConfig
from cramjax.parallel import batch_sharding, on_mesh, zero_shardings
from cramjax.training.offload import Offloaded, device_program
from cramjax.training.parts import Parts, step_for
from cramjax.training.step import Batch, DeviceProgram, State, initial_state, state_shardings


class Program(NamedTuple):
    """A run's step, and what it starts from."""

    step: Any
    """Traced; its `compile()` makes it `(state, batch, fraction) -> (state, metrics)`, with `as_text()` and
    `memory_analysis()` of what the devices run."""
    like: State
    """Shapes and places of a state, as `jax.ShapeDtypeStruct`s."""
    create: Callable[..., State]
    """Makes the first state: `(progress = None) -> State`; `progress` is told, in sentences, what takes long."""
    batch: Batch
    """Shapes and places of a batch."""
    parts: Parts


def step_program(config: RunConfig, parts: Parts) -> Program:
    """The step of a run on the devices of its mesh, traced.

    Args:
        config: the run.
        parts: what it is made of.

    Raises:
        RunError: the optimizer is to be on the host, and these devices cannot reach it.
    """
    batch = batch_like(config, parts)
    if config.train.offload_optimizer:
        offloaded = Offloaded(config, parts, batch)
        return Program(offloaded, offloaded.like, offloaded.create, batch, parts)
    like, key = _state_like(config, parts), jax.random.key(config.seed)
    create = jax.jit(lambda key: _create(config, parts, key), out_shardings=jax.tree.map(lambda x: x.sharding, like))
    step = _whole_step(config, parts, like, batch).lower(config.budget)
    return Program(step, like, lambda _=None: create(key), batch, parts)


def devices_program(config: RunConfig, parts: Parts) -> DeviceProgram:
    """What the devices run in a step, not traced yet: all of it, or without the optimizer that is on the host.

    The devices may be such as are only described.
    """
    batch = batch_like(config, parts)
    if config.train.offload_optimizer:
        return device_program(config, parts.loss_function, parts.mesh, batch)
    return _whole_step(config, parts, _state_like(config, parts), batch)


def batch_like(config: RunConfig, parts: Parts) -> Batch:
    """Shapes and places of the batch of a step."""
    length = config.data.sequence_length + (config.objective.kind == "causal")
    shape = config.batch.size // parts.microbatch, parts.microbatch, length
    return Batch(
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=_rows(parts.mesh)),  # pyright: ignore[reportArgumentType]
        jax.ShapeDtypeStruct((), jnp.int32),  # pyright: ignore[reportArgumentType]
    )


def _rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, jax.P(None, *batch_sharding(mesh).spec))


def _create(config: RunConfig, parts: Parts, key: jax.Array) -> State:
    return initial_state(parts.model.init(key), parts.optimizer, config.seed, config.train.freeze)


def _state_like(config: RunConfig, parts: Parts) -> State:
    state = jax.eval_shape(lambda: _create(config, parts, jax.random.key(config.seed)))
    shardings = state_shardings(parts.mesh, state, parts.model.weights, config.train.zero)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def _whole_step(config: RunConfig, parts: Parts, like: State, batch: Batch) -> DeviceProgram:
    mesh = parts.mesh
    shared = None if mesh.size == 1 else zero_shardings(mesh, like.params, parts.model.weights, config.train.zero)
    pure = on_mesh(mesh, step_for(config, parts.loss_function, parts.optimizer, shared))
    arguments = like, batch, jax.ShapeDtypeStruct((), jnp.float32)
    return DeviceProgram(pure, arguments, (jax.tree.map(lambda x: x.sharding, like), None), donate=(0,))
