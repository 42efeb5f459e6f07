"""The plain training method: a step is one program on the devices, and the whole state lies there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from cramjax.config import RunConfig
from cramjax.model import Model, width_ratio
from cramjax.optim import Optimizer, make_optimizer
from cramjax.parallel import StateSharding, on_mesh, param_shardings, zero_shardings
from cramjax.training.frozen import split, untrained
from cramjax.training.program import Method, Parts, Program
from cramjax.training.step import (
    Batch,
    DeviceProgram,
    State,
    evaluation_params,
    initial_state,
    make_step,
    state_shardings,
)

MakeStep = Callable[[RunConfig, Parts, StateSharding | None], Callable[..., Any]]


def one_program(optimizer: Callable[[RunConfig, Model], Any], make: MakeStep, *, accumulates: bool) -> Method:
    """A method whose step is one program on the devices.

    Args:
        optimizer: as of `Method`.
        make: `(config, parts, sharding) -> step`, pure; `sharding` is how devices share gradients and the update, None
            on one device.
        accumulates: as of `Method`.
    """

    def device_program(config: RunConfig, parts: Parts, batch: Batch) -> DeviceProgram:
        mesh, like = parts.mesh, _state_like(config, parts.model, parts.optimizer, parts.mesh)
        shared = None if mesh.size == 1 else zero_shardings(mesh, like.params, parts.model.weights, config.train.zero)
        pure = on_mesh(mesh, make(config, parts, shared))
        arguments = like, batch, jax.ShapeDtypeStruct((), jnp.float32)
        return DeviceProgram(pure, arguments, (jax.tree.map(lambda x: x.sharding, like), None), donate=(0,))

    def program(config: RunConfig, parts: Parts, batch: Batch) -> Program:
        step, key = device_program(config, parts, batch), jax.random.key(config.seed)

        def first(params: PyTree) -> State:
            return initial_state(params, parts.optimizer, config.seed, untrained(parts.model, config.train.freeze))

        def create(_: Any = None, params: PyTree | None = None) -> State:
            places: State = step.out_shardings[0]
            if params is None:
                return jax.jit(lambda key: first(parts.model.init(key)), out_shardings=places)(key)
            # They lie where they were read. What is not trained goes to its place without a copy.
            trained, frozen = split(params, untrained(parts.model, config.train.freeze))
            trained = jax.device_put(trained, param_shardings(parts.mesh, trained, parts.model.weights))
            make = jax.jit(
                lambda trained: initial_state(trained, parts.optimizer, config.seed),
                out_shardings=places._replace(frozen=()),
            )
            return make(trained)._replace(frozen=jax.device_put(frozen, places.frozen))

        return Program(step.lower(config.budget), step.arguments[0], create, batch, parts)

    return Method(optimizer, _state_like, program, device_program, evaluation_params, accumulates)


def _state_like(config: RunConfig, model: Model, optimizer: Any, mesh: Mesh) -> State:
    state = jax.eval_shape(
        lambda params: initial_state(params, optimizer, config.seed, untrained(model, config.train.freeze)),
        model.abstract_params(),
    )
    shardings = state_shardings(mesh, state, model.weights, config.train.zero)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def _optimizer(config: RunConfig, model: Model) -> Optimizer:
    trained, _ = split(model.weights, untrained(model, config.train.freeze))
    return make_optimizer(config.optim, trained, width_ratio=width_ratio(config.model))


METHOD = one_program(
    _optimizer,
    lambda config, parts, sharding: make_step(parts.loss_function, parts.optimizer, sharding),
    accumulates=True,
)
