"""From a configuration and prepared data to the parts of a run: model, objective, optimizer, mesh, shardings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cramjax import devices
from cramjax.config import RunConfig
from cramjax.data import Tokenizer
from cramjax.errors import ConfigError
from cramjax.model import (
    Model,
    count_parameters,
    make_model,
    objective_for,
    train_flops_per_token,
)
from cramjax.parallel import make_mesh
from cramjax.training.methods import method_of
from cramjax.training.program import Parts


@dataclass(frozen=True)
class Vocabulary:
    """What the parts of a run read of a tokenizer, where there is none yet."""

    vocab_size: int
    """Tokens, special ones included."""
    separator_id: int
    """The token around every document."""
    mask_id: int | None
    """The token that hides another from a masked model."""


def build_model(config: RunConfig, tokenizer: Tokenizer | Vocabulary, compute_dtype: str | None = None) -> Model:
    """The model a configuration describes, for a tokenizer's vocabulary.

    Args:
        config: the run's configuration.
        tokenizer: gives the vocabulary size and the separator.
        compute_dtype: overrides the configured precision.
    """
    return make_model(
        config.model,
        vocab_size=tokenizer.vocab_size,
        sequence_length=config.data.sequence_length,
        causal=config.objective.causal,
        separator_id=tokenizer.separator_id,
        compute_dtype=compute_dtype or resolve_dtype(config.train.compute_dtype),  # pyright: ignore[reportArgumentType]
        layer_loop=config.train.layer_loop,
        remat=config.train.remat,
        param_dtype=config.train.param_dtype,
        adapter=config.adapter,
    )


def optimizer_for(config: RunConfig, model: Model) -> Any:
    """The optimizer a configuration describes, for those of a model's parameters that are trained."""
    return method_of(config).optimizer(config, model)


def build_parts(config: RunConfig, tokenizer: Tokenizer | Vocabulary, devices: Sequence[Any] | None = None) -> Parts:
    """All parts of a run.

    Args:
        config: the run.
        tokenizer: gives the vocabulary size and special tokens.
        devices: on which. Default: those there are.

    Raises:
        ConfigError: the microbatch cannot be shared among the devices, or the mesh does not fit them.
    """
    mesh = make_mesh(config.train.data_parallel, config.train.fsdp, devices)
    microbatch = config.batch.microbatch or config.batch.size
    if microbatch % mesh.size:
        raise ConfigError(
            f"batch.microbatch is {microbatch} sequences, which {mesh.size} devices cannot share equally: "
            f"make it a multiple of {mesh.size}, or use fewer devices (train.data_parallel, train.fsdp)."
        )
    model = build_model(config, tokenizer)
    sizes = {"vocab_size": tokenizer.vocab_size, "sequence_length": config.data.sequence_length}
    return Parts(
        model=model,
        loss_function=objective_for(config.objective, model, mask_id=tokenizer.mask_id),
        optimizer=optimizer_for(config, model),
        mesh=mesh,
        parameters=count_parameters(config.model, **sizes).total,
        flops_per_token=flops_per_token(config, tokenizer.vocab_size),
        microbatch=microbatch,
    )


def flops_per_token(config: RunConfig, vocab_size: int) -> float:
    """Model FLOPs of forward and backward for each token of a training sequence, under the run's objective.

    Args:
        config: the run.
        vocab_size: tokens of its vocabulary, without padding.
    """
    objective, length = config.objective, config.data.sequence_length
    # The reference of preferences is one more forward pass to a forward and a backward one.
    passes = 4 / 3 if objective.kind == "preference" else 1.0
    return passes * train_flops_per_token(
        config.model,
        vocab_size,
        length,
        causal=objective.causal,
        mask_rate=objective.mask_rate if objective.kind == "masked" else objective.predicted(length) / length,
    )


def resolved(config: RunConfig) -> RunConfig:
    """The same with what depends on the machine decided: what a run keeps, so that it goes on as it began."""
    dtype: Any = resolve_dtype(config.train.compute_dtype)
    return replace(config, train=replace(config.train, compute_dtype=dtype))


def resolve_dtype(configured: str) -> str:
    """The precision of matrix products: as configured, or for `auto` bfloat16 where that is fast, else float32."""
    if configured != "auto":
        return configured
    return "bfloat16" if devices.fast_bfloat16() else "float32"
