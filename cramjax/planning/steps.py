"""The training step of a configuration, compiled for a GPU without data: only sizes enter it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cramjax.config import RunConfig
from cramjax.errors import ConfigError
from cramjax.gpus import gpu_named
from cramjax.model import Model, Objective, objective_for
from cramjax.planning.targets import Compiled, compile_for, tracing_for
from cramjax.train.offload import device_params, host_bytes, make_gradient
from cramjax.train.parts import Vocabulary, build_model, optimizer_for
from cramjax.train.step import Batch, State, initial_state, make_step


def compile_step(config: RunConfig, target: str) -> Compiled:
    """Compile the training step of a configuration for one GPU; its state is donated, as in training.

    Args:
        config: the run. Its tokenizer must have a configured size (`bpe`, `wordpiece` or `bytes`).
        target: a card, as `cramjax.gpus.gpu_named` understands it.

    Raises:
        ConfigError: the target or the size of the vocabulary is not known, or this machine cannot compile for GPUs.
    """
    vocabulary = _vocabulary(config)
    with tracing_for(gpu_named(target)):
        model = build_model(config, vocabulary)
        optimizer = optimizer_for(config, model)
        loss_function = objective_for(config.objective, model, mask_id=vocabulary.mask_id)

        def create() -> State:
            return initial_state(model.init(jax.random.key(config.seed)), optimizer, config.seed)

        microbatch = config.batch.microbatch or config.batch.size
        length = config.data.sequence_length + (config.objective.kind == "causal")
        shape = config.batch.size // microbatch, microbatch, length
        batch = jax.eval_shape(lambda: Batch(jnp.zeros(shape, jnp.int32), jnp.zeros((), jnp.int32)))
        fraction = jax.ShapeDtypeStruct((), jnp.float32)
        if config.train.offload_optimizer:
            return _compile_offloaded(config, target, model, loss_function, batch.tokens)
        return compile_for(
            target, make_step(loss_function, optimizer), jax.eval_shape(create), batch, fraction, donate=(0,)
        )


def _compile_offloaded(config: RunConfig, target: str, model: Model, objective: Objective, tokens: Array) -> Compiled:
    """The device's program of a step whose optimizer is on the host, beside what stays in host memory."""
    step, key = jax.eval_shape(lambda: (jnp.zeros((), jnp.int32), jax.random.key_data(jax.random.key(0))))
    fraction = jax.ShapeDtypeStruct((), jnp.float32)
    gradient = make_gradient(config, objective)
    compiled = compile_for(target, gradient, device_params(config, model), step, key, tokens, step, fraction)
    return replace(compiled, host=compiled.host + host_bytes(config, model))


def _vocabulary(config: RunConfig) -> Vocabulary:
    """The size of the vocabulary that a configuration asks for; which tokens are special changes no shape."""
    if config.tokenizer.kind == "file":
        raise ConfigError("tokenizer.kind is file: how many tokens it has is known once it is read, not before.")
    bytes_and_special = 256 + 2
    size = bytes_and_special if config.tokenizer.kind == "bytes" else config.tokenizer.vocab_size
    return Vocabulary(size, separator_id=0, mask_id=1)
