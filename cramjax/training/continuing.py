"""Continued pretraining: a run that starts from the weights of a model, with a budget and a clock of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from cramjax.config import RunConfig
from cramjax.errors import ConfigError, ModelError
from cramjax.kernels.packed import is_packed, unpacked
from cramjax.language_model import LanguageModel
from cramjax.model import Model
from cramjax.model_yaml import is_model_directory, read_description
from cramjax.recipes import validate
from cramjax.training.given import language_model
from cramjax.training.run import read_config

_OWN = ("dropout", "mask_documents")
"""Fields of the architecture that change no weight: the run's own."""


def continued(config: RunConfig) -> RunConfig:
    """A configuration with the architecture, vocabulary and objective of the model that it starts from, if any.

    Sequences are as long as the run says, but for models that see fewer tokens. Text is normalised as it was for the
    model, whose vocabulary may know no other (such as one of lower-case words).

    Args:
        config: the run.

    Raises:
        UserError: what it starts from is no model or run, or predicts nothing.
    """
    if config.start_from is None:
        if config.adapter is not None or config.examples is not None:
            raise ConfigError(
                "this recipe fine-tunes a model, and none is given: cramjax tune MODEL RECIPE (or start_from, as "
                "--model.from=MODEL)."
            )
        return config
    path = Path(config.start_from).expanduser()
    if is_model_directory(path):
        description = read_description(path)
        architecture, context, kind = description.architecture, description.context, description.kind
        normalize = description.normalize
    else:
        run = read_config(path)
        architecture, context = run.model, run.data.sequence_length
        kind = "causal" if run.objective.causal else "masked"
        normalize = run.data.normalize
    if kind == "encoder":
        raise ModelError(
            f"{path} is an encoder without a head, which predicts nothing to train on: give another model."
        )
    if architecture.positions in ("learned", "sinusoidal") and architecture.max_positions is None:
        architecture = replace(architecture, max_positions=context)
    made = replace(
        config,
        start_from=str(path.absolute()),
        data=replace(config.data, sequence_length=min(config.data.sequence_length, context), normalize=normalize),
        tokenizer=replace(config.tokenizer, kind="file", path=str((path / "tokenizer.json").absolute())),
        model=replace(architecture, **{name: getattr(config.model, name) for name in _OWN}),
        objective=replace(config.objective, kind=kind),
        # A masked model fills masks, and those of a causal recipe have none.
        evaluate=replace(
            config.evaluate, samples=tuple(s for s in config.evaluate.samples if kind == "causal" or "[MASK]" in s)
        ),
        # A tied head is the embedding, and has no rate of its own: the recipe's was for the head it would have made.
        optim=replace(config.optim, head_lr=None) if architecture.tied else config.optim,
    )
    validate(made)
    return made


def starting_params(path: str | Path, model: Model, seed: int) -> PyTree:
    """The weights of a model, as another with the same architecture has them, with its adapter as that starts.

    Rows of the vocabulary that no token has are cut off, and padding is filled with zeros. Packed weights are unpacked:
    all of them can be trained, or packed as the adapter's base is.

    Args:
        path: of a model or run directory.
        model: the one that is to have them.
        seed: of the run; the adapter is drawn from it.

    Raises:
        ModelError: a weight has another shape, is missing, or is left over.
    """
    given = language_model(path)
    wanted = jax.tree_util.tree_flatten_with_path(model.bare.weights)[0]
    found = dict(jax.tree_util.tree_flatten_with_path(given.params, is_leaf=is_packed)[0])
    leaves = []
    for place, weight in wanted:
        name = jax.tree_util.keystr(place, simple=True, separator="/")
        if place not in found:
            raise ModelError(f"{path} has no weights for {name}, which this architecture has.")
        leaves.append(_fitted(unpacked(found.pop(place)), weight, given, model, name))
    if found:
        name = jax.tree_util.keystr(next(iter(found)), simple=True, separator="/")
        raise ModelError(f"{path} has weights for {name}, which this architecture does not have.")
    params = jax.tree.unflatten(jax.tree.structure(model.bare.weights), leaves)
    return model.adapted(params, jax.random.key(seed))


def _fitted(leaf: Any, weight: Any, given: LanguageModel, model: Model, name: str) -> Any:
    """A weight with the rows and columns of the vocabulary that the model has."""
    if leaf.shape == weight.stacked_shape:
        return leaf.astype(model.param_dtype)
    vocabulary = [axis == "vocab" for axis in weight.stacked_axes]
    fits = len(leaf.shape) == len(vocabulary) and all(
        has == wants or cut for has, wants, cut in zip(leaf.shape, weight.stacked_shape, vocabulary, strict=True)
    )
    tokens = min(given.model.vocab_size, model.vocab_size)
    if not fits or tokens < model.vocab_size:
        raise ModelError(f"{name} must have shape {weight.stacked_shape}, and {given.path} has {leaf.shape} of it.")
    kept = leaf[tuple(slice(tokens if cut else None) for cut in vocabulary)]
    padding = [(0, wants - has) for has, wants in zip(kept.shape, weight.stacked_shape, strict=True)]
    return jnp.pad(kept, padding).astype(model.param_dtype)
