"""The interface of training methods: from sizes alone, each gives a run's step, and what it starts from.

Runs and plans ask for the same programs, so that what a plan has compiled and timed is in the cache when a run starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from cramjax.config import RunConfig
from cramjax.model import Model, Objective
from cramjax.parallel import batch_sharding
from cramjax.training.step import Batch, DeviceProgram, State


@dataclass(frozen=True)
class Parts:
    """What a run is made of, before it has any state."""

    model: Model
    loss_function: Objective
    optimizer: Any
    """Of the run's training method."""
    mesh: Mesh
    parameters: int
    flops_per_token: float
    """Model FLOPs of forward and backward for each token of a training sequence."""
    microbatch: int
    """Sequences per forward-backward pass."""


class Program(NamedTuple):
    """A run's step, and what it starts from."""

    step: Any
    """Traced; its `compile()` makes it `(state, batch, fraction) -> (state, metrics)`, with `as_text()` and
    `memory_analysis()` of what the devices run."""
    like: State
    """Shapes and places of a state, as `jax.ShapeDtypeStruct`s."""
    create: Callable[..., State]
    """Makes the first state: `(progress = None, params = None) -> State`; `progress` is told, in sentences, what takes
    long, and `params` are those of the whole model, where they are not to be drawn. With the optimizer on the host
    they always are."""
    batch: Batch
    """Shapes and places of a batch."""
    parts: Parts


@dataclass(frozen=True)
class Method:
    """A way to train: a file of its own. `cramjax.training.methods` chooses one, and nobody else asks which it is."""

    optimizer: Callable[[RunConfig, Model], Any]
    """`(config, model) -> optimizer`, for those of the model's parameters that are trained."""
    state_like: Callable[[RunConfig, Model, Any, Mesh], State]
    """`(config, model, optimizer, mesh) -> state`: shapes and places, as `jax.ShapeDtypeStruct`s."""
    program: Callable[[RunConfig, Parts, Batch], Program]
    """`(config, parts, batch) -> program`, traced for the devices there are; a RunError where they cannot run it."""
    device_program: Callable[[RunConfig, Parts, Batch], DeviceProgram]
    """`(config, parts, batch) -> program`: what devices run in a step, not traced yet. They may only be described."""
    evaluation_params: Callable[[State, Any], PyTree]
    """`(state, optimizer) -> parameters` of the whole model, to evaluate with: averaged where there is an average."""
    accumulates: bool = True
    """Whether a step may take its batch in several microbatches."""
    on_host: bool = False
    """Whether float32 weights and the optimizer's state lie in host memory, and blocks' gradients leave for there."""
    host_bytes: Callable[[RunConfig, int, int], dict[str, int]] = lambda config, parameters, copies: {}
    """`(config, parameters, copies) -> bytes` of host memory by kind: see `cramjax.training.offload_state`."""


def batch_like(config: RunConfig, parts: Parts) -> Batch:
    """Shapes and places of the batch of a step."""
    row = config.objective.row_shape(config.data.sequence_length)
    shape = config.batch.size // parts.microbatch, parts.microbatch, *row
    rows = NamedSharding(parts.mesh, jax.P(None, *batch_sharding(parts.mesh).spec))
    return Batch(
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),  # pyright: ignore[reportArgumentType]
        jax.ShapeDtypeStruct((), jnp.int32),  # pyright: ignore[reportArgumentType]
    )
