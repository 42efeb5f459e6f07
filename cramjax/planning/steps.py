"""The training step of a configuration, compiled for a GPU without data: only sizes enter it."""

from dataclasses import replace
from pathlib import Path

import jax

from cramjax.config import RunConfig
from cramjax.data import Tokenizer, prepared_already
from cramjax.errors import ConfigError
from cramjax.gpus import gpu_named
from cramjax.parallel.offload import PINNED
from cramjax.planning.targets import Compiled, compile_for, compiled_of, devices_of, tracing_for
from cramjax.training.methods import devices_program, method_of, step_program
from cramjax.training.parts import Vocabulary, build_parts
from cramjax.training.program import Parts, Program


def compile_step(config: RunConfig, target: str, devices: int = 1) -> Compiled:
    """Compile the training step of a configuration for a GPU; its state is donated, as in training.

    Args:
        config: the run. Its tokenizer is of a configured size, or a file that is there.
        target: a card, as `cramjax.gpus.gpu_named` understands it.
        devices: how many such GPUs share the work, as `train.data_parallel` and `train.fsdp` say. What is reported is
            the program and the memory of each, and the host memory of all.

    Raises:
        ConfigError: the target or the size of the vocabulary is not known, the devices cannot be divided so, or this
            machine cannot compile for GPUs.
    """
    with tracing_for(gpu_named(target)):
        parts = build_parts(config, vocabulary_of(config), devices_of(target, devices))
        program = devices_program(config, parts)
    leaves = any(place.memory_kind == PINNED for place in jax.tree.leaves(program.out_shardings))
    compiled = compile_for(
        target,
        program.function,
        *program.arguments,
        donate=program.donate,
        mesh=parts.mesh,
        # Devices that are only described have one kind of memory by name: what leaves for the host says so itself.
        out_shardings=None if leaves else program.out_shardings,
    )
    return _with_host(config, parts, compiled)


def program_here(config: RunConfig, vocabulary: Vocabulary) -> Program:
    """The training step of a configuration for the devices there are: the program that a run will ask for.

    Raises:
        ConfigError: the configuration cannot run on the devices there are.
    """
    return step_program(config, build_parts(config, vocabulary))


def compile_here(config: RunConfig) -> Compiled:
    """Compile the training step of a configuration for the devices there are; its state is donated, as in training.

    Raises:
        ConfigError: the vocabulary's size is not known, or the configuration cannot run on the devices there are.
    """
    program = program_here(config, vocabulary_of(config))
    return _with_host(config, program.parts, compiled_of(None, program.step.compile()))


def _with_host(config: RunConfig, parts: Parts, compiled: Compiled) -> Compiled:
    """The host bytes of all devices: what their program sends there, and what is kept and updated there."""
    host = parts.mesh.size * compiled.host
    kept = method_of(config).host_bytes(config, parts.parameters, parts.mesh.shape["data"])
    return replace(compiled, host=host + sum(size for kind, size in kept.items() if kind != "sent"))


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
