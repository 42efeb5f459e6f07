"""The training step of a configuration, compiled for a GPU without data: only sizes enter it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from cramjax.config import RunConfig
from cramjax.data import Tokenizer, prepared_already
from cramjax.errors import ConfigError
from cramjax.gpus import gpu_named
from cramjax.model import Objective, objective_for
from cramjax.parallel import batch_sharding, make_mesh, on_mesh, zero_shardings
from cramjax.planning.targets import Compiled, compile_for, compiled_of, devices_of, tracing_for
from cramjax.train.offload import device_program, host_bytes
from cramjax.train.parts import Parts, Vocabulary, build_model, build_parts, optimizer_for, step_for
from cramjax.train.step import Batch, State, initial_state, state_shardings


def compile_step(config: RunConfig, target: str, devices: int = 1) -> Compiled:
    """Compile the training step of a configuration for a GPU; its state is donated, as in training.

    Args:
        config: the run. Its tokenizer is of a configured size, or a file that is there.
        target: a card, as `cramjax.gpus.gpu_named` understands it.
        devices: how many such GPUs share the work, as `train.data_parallel` and `train.fsdp` say. What is reported is
            the program and the memory of each.

    Raises:
        ConfigError: the target or the size of the vocabulary is not known, the devices cannot be divided so, or this
            machine cannot compile for GPUs.
    """
    vocabulary = vocabulary_of(config)
    with tracing_for(gpu_named(target)):
        mesh = make_mesh(config.train.data_parallel, config.train.fsdp, devices_of(target, devices))
        model = build_model(config, vocabulary)
        optimizer = optimizer_for(config, model)
        loss_function = objective_for(config.objective, model, mask_id=vocabulary.mask_id)

        def create() -> State:
            return initial_state(model.init(jax.random.key(config.seed)), optimizer, config.seed)

        microbatch = config.batch.microbatch or config.batch.size
        length = config.data.sequence_length + (config.objective.kind == "causal")
        shape = config.batch.size // microbatch, microbatch, length
        rows = NamedSharding(mesh, jax.P(None, *batch_sharding(mesh).spec))
        batch = Batch(
            jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),  # pyright: ignore[reportArgumentType]
            jax.ShapeDtypeStruct((), jnp.int32),  # pyright: ignore[reportArgumentType]
        )
        if config.train.offload_optimizer:
            return _compile_offloaded(config, target, mesh, loss_function, batch)
        state = jax.eval_shape(create)
        shardings = state_shardings(mesh, state, config.train.zero)
        shared = None if mesh.size == 1 else zero_shardings(mesh, state.params, config.train.zero)
        return compile_for(
            target,
            on_mesh(mesh, step_for(config, loss_function, optimizer, shared)),
            jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings),
            batch,
            jax.ShapeDtypeStruct((), jnp.float32),
            donate=(0,),
            mesh=mesh,
            out_shardings=(shardings, None),
        )


def _compile_offloaded(config: RunConfig, target: str, mesh: Mesh, objective: Objective, batch: Batch) -> Compiled:
    """The device's program of a step whose optimizer is on the host, and all bytes of host memory that it takes."""
    function, arguments, out_shardings = device_program(config, objective, mesh, batch)
    # Devices that are only described have one kind of memory by name: what leaves for the host says so itself.
    del out_shardings
    compiled = compile_for(target, function, *arguments, mesh=mesh)
    return replace(compiled, host=compiled.host + host_bytes(config, objective.model))


class Program(NamedTuple):
    """A run's step on the devices there are, and what it starts from."""

    step: Any
    """`jax.stages.Lowered`: `(state, batch, fraction) -> (state, metrics)`."""
    create: Callable[[], State]
    """Makes the first state."""
    batch: Batch
    """Shapes and places of a batch."""
    parts: Parts


def program_here(config: RunConfig, vocabulary: Vocabulary) -> Program:
    """The training step of a configuration for the devices there are: the program that a run will ask for.

    Raises:
        ConfigError: the configuration cannot run on the devices there are.
    """
    parts, key = build_parts(config, vocabulary), jax.random.key(config.seed)

    def create(key: jax.Array) -> State:
        return initial_state(parts.model.init(key), parts.optimizer, config.seed)

    state = jax.eval_shape(create, key)
    shardings = state_shardings(parts.mesh, state, config.train.zero)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    shared = None if parts.mesh.size == 1 else zero_shardings(parts.mesh, state.params, config.train.zero)
    pure = on_mesh(parts.mesh, step_for(config, parts.loss_function, parts.optimizer, shared))
    step = jax.jit(pure, donate_argnums=0, out_shardings=(shardings, None))
    length = config.data.sequence_length + (config.objective.kind == "causal")
    shape = config.batch.size // parts.microbatch, parts.microbatch, length
    rows = NamedSharding(parts.mesh, jax.P(None, *batch_sharding(parts.mesh).spec))
    batch = Batch(
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),  # pyright: ignore[reportArgumentType]
        jax.ShapeDtypeStruct((), jnp.int32),  # pyright: ignore[reportArgumentType]
    )
    lowered = step.lower(like, batch, jax.ShapeDtypeStruct((), jnp.float32))
    return Program(lowered, lambda: jax.jit(create, out_shardings=shardings)(key), batch, parts)


def compile_here(config: RunConfig) -> Compiled:
    """Compile the training step of a configuration for the devices there are; its state is donated, as in training.

    Raises:
        ConfigError: the vocabulary's size is not known, or the configuration cannot run on the devices there are.
    """
    return compiled_of(None, program_here(config, vocabulary_of(config)).step.compile())


def vocabulary_of(config: RunConfig) -> Vocabulary:
    """The size of the vocabulary that a configuration asks for; which tokens are special changes no shape.

    It is the prepared data's where there is some: a small corpus may have fewer tokens than are asked for.

    Raises:
        ConfigError: the tokenizer is a file that cannot be read.
    """
    prepared = prepared_already(config.data, config.tokenizer)
    if prepared is not None:
        return Vocabulary(prepared.tokenizer.vocab_size, separator_id=0, mask_id=1)
    if config.tokenizer.kind == "file":
        path = Path(config.tokenizer.path or "").expanduser()
        if not path.is_file():
            raise ConfigError(
                f"tokenizer.kind is file, and how many tokens it has is known once it is read, but there is no {path}: "
                "give tokenizer.path."
            )
        return Vocabulary(Tokenizer.load(path).vocab_size, separator_id=0, mask_id=1)
    bytes_and_special = 256 + 2
    size = bytes_and_special if config.tokenizer.kind == "bytes" else config.tokenizer.vocab_size
    return Vocabulary(size, separator_id=0, mask_id=1)
