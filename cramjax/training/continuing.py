"""Continued pretraining: a run that starts from the weights of a model, with a budget and a clock of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cramjax.classifier import ClassifierConfig
from cramjax.config import ModelConfig, RunConfig
from cramjax.data import Tokenizer
from cramjax.data.examples import has_pairs, prepare_labels
from cramjax.errors import ConfigError, ModelError
from cramjax.examples import LabelsConfig
from cramjax.formats.tokens import CHAT_TEMPLATE, read_text
from cramjax.kernels.packed import (
    Prompted,
    Virtual,
    is_packed,
    unpacked,
    with_factors_in_biases,
    without_rounding,
)
from cramjax.language_model import LanguageModel
from cramjax.language_model.directory import load_model, read_tokenizer
from cramjax.model import Model
from cramjax.model.adapters import as_base, held_by_layer
from cramjax.model_yaml import is_model_directory, kind_of, read_description
from cramjax.recipes import validate
from cramjax.start import start
from cramjax.training.given import language_model
from cramjax.training.run import read_config

_OWN = ("dropout", "mask_documents")
"""Fields of the architecture that change no weight: the run's own."""


def continued(config: RunConfig) -> RunConfig:
    """A configuration with the architecture, vocabulary and objective of the model that it starts from, if any.

    Sequences are as long as the run says, but for models that see fewer tokens; what the model sees when it is used
    stays, but for labels, which are given texts as long as those that they were trained on. Text is normalised as it
    was for the model, whose vocabulary may know no other (such as one of lower-case words).

    Args:
        config: the run.

    Raises:
        UserError: what it starts from is no model or run, or predicts nothing.
    """
    if config.start_from is None:
        return config if config.labels is None else _planned_labels(config)
    path = Path(config.start_from).expanduser()
    if is_model_directory(path):
        description = read_description(path)
        architecture, context, kind = description.architecture, description.context, description.kind
        normalize = description.normalize
    else:
        run = read_config(path)
        architecture, context = run.model, run.context
        kind = kind_of(run)
        normalize = run.data.normalize
    causal = kind in ("causal", "causal_labels")
    if config.labels is None and architecture.classifier is not None:
        raise ConfigError(
            f"{path} gives labels, not tokens: tune it on labelled texts (the group `labels`), or give the model that "
            "it was tuned from."
        )
    if not causal and config.examples is not None:
        raise ConfigError(
            f"{path} is no causal model, and examples are predicted token by token: give a causal model, or tune this "
            "one on text (without the group `examples`) or on labels."
        )
    if kind == "encoder" and config.labels is None:
        raise ModelError(
            f"{path} is an encoder without a head, which predicts nothing to train on: give another model, or tune it "
            "on labels."
        )
    if architecture.positions in ("learned", "sinusoidal") and architecture.max_positions is None:
        architecture = replace(architecture, max_positions=context)
    sees = _sees(config, context)
    length = min(config.data.sequence_length, sees)
    kept = None if config.labels is not None else min(config.data.context or sees, sees)
    made = replace(
        config,
        start_from=str(path.absolute()),
        data=replace(config.data, sequence_length=length, context=kept, normalize=normalize),
        tokenizer=replace(config.tokenizer, kind="file", path=str((path / "tokenizer.json").absolute())),
        model=replace(architecture, **{name: getattr(config.model, name) for name in _OWN}),
        objective=replace(config.objective, kind=_objective_of(config, kind, causal=causal)),
        # A masked model fills masks, and those of a causal recipe have none.
        evaluate=replace(config.evaluate, samples=_samples_of(config, causal=causal)),
        # A tied head is the embedding, and has no rate of its own: the recipe's was for the head it would have made.
        optim=replace(config.optim, head_lr=None) if architecture.tied else config.optim,
    )
    if config.labels is not None:
        made = _with_labels(made, path)
    validate(made)
    return made


def _objective_of(config: RunConfig, kind: str, *, causal: bool) -> Any:
    """The kind of objective that a run on a model of a kind has."""
    if config.labels is not None:
        return "causal_labels" if causal else "labels"
    return kind if config.examples is None else config.examples.objective


def _samples_of(config: RunConfig, *, causal: bool) -> tuple[str, ...]:
    """The prompts that a model can continue, or fill the masks of."""
    return tuple(s for s in config.evaluate.samples if config.labels is None and (causal or "[MASK]" in s))


def _with_labels(config: RunConfig, path: Path) -> RunConfig:
    """A run with what its data says where it does not: names of labels, and whether rows are pairs; and its head."""
    assert config.labels is not None, "a run on labels"
    given = replace(config.labels, pairs=has_pairs(config.labels))
    if given.target == "class" and not given.names:
        tokenizer, _ = model_vocabulary(path)
        given = replace(given, names=prepare_labels(given, tokenizer, config.data.sequence_length).labels)
    return replace(config, labels=given, model=_headed(config.model, given))


def _planned_labels(config: RunConfig) -> RunConfig:
    """A run on labels with no model given, to be planned: its own architecture, two classes unless they are named."""
    assert config.labels is not None, "a run on labels"
    names = config.labels.names or (("0", "1") if config.labels.target == "class" else ())
    kind = _objective_of(config, "", causal=config.objective.causal)
    model = _headed(config.model, replace(config.labels, names=names))
    return replace(config, model=model, objective=replace(config.objective, kind=kind))


def _headed(model: ModelConfig, labels: LabelsConfig) -> ModelConfig:
    head = ClassifierConfig(tuple(labels.names), labels.head_width, labels.head_dropout, labels.pairs)
    return replace(model, classifier=head)


def _sees(config: RunConfig, context: int) -> int:
    """Tokens that the model sees beside virtual ones."""
    adapter = config.adapter
    virtual = adapter.virtual_tokens if adapter is not None and adapter.kind in ("prompt", "prefix") else 0
    if virtual >= context:
        raise ConfigError(
            f"adapter.virtual_tokens is {virtual}, and the model sees {context} tokens, these included: lower it."
        )
    return context - virtual


def require_model(config: RunConfig) -> None:
    """Refuse to train what fine-tunes a model without one; it can only be planned.

    Raises:
        ConfigError: it is so.
    """
    if config.start_from is None and any((config.adapter, config.examples, config.labels)):
        raise ConfigError(
            "this recipe fine-tunes a model, and none is given: cramjax tune MODEL RECIPE (or start_from, as "
            "--model.from=MODEL)."
        )


def model_vocabulary(path: str | Path) -> tuple[Tokenizer, str | None]:
    """The tokenizer and the chat template of a model, special tokens as its `model.yaml` has them, or of a run.

    Args:
        path: its directory.

    Raises:
        UserError: it has no vocabulary, or that is damaged.
    """
    path = Path(path).expanduser()
    if is_model_directory(path):
        tokenizer = read_tokenizer(path, read_description(path))
    else:
        tokenizer = Tokenizer.load(path / "tokenizer.json")
    return tokenizer, read_text(path / CHAT_TEMPLATE)


def run_vocabulary(config: RunConfig, out: Path) -> tuple[Tokenizer, str | None]:
    """The tokenizer and the chat template of a tuned run: its own copies; before it has begun, those of its model.

    Args:
        config: the run.
        out: its directory.

    Raises:
        UserError: as `model_vocabulary`.
    """
    assert config.start_from is not None, "tuning is for a model that there is"
    return model_vocabulary(out if (out / "tokenizer.json").is_file() else config.start_from)


def starting_params(path: str | Path, model: Model, seed: int = 0) -> PyTree:
    """The weights of a model, as another with the same architecture has them, with its adapter as that starts.

    Rows of the vocabulary that no token has are cut off, and padding is filled with zeros. Packed weights are unpacked,
    with their adapters in them: all of them can be trained, or packed as the adapter's base is. That is packed as it is
    read, a layer at a time; matrices that are packed in the bits and groups of the base already stay as they are.
    Activations are not rounded while it is tuned, nor afterwards.

    Args:
        path: of a model or run directory.
        model: the one that is to have them.
        seed: of the run; the adapter is drawn from it.

    Raises:
        ModelError: a weight has another shape, is missing, or is left over.
    """
    packed: set[str] = set()
    given = _given(path, model, packed)
    wanted = jax.tree_util.tree_flatten_with_path(model.bare.weights)[0]
    found = dict(jax.tree_util.tree_flatten_with_path(with_factors_in_biases(given.params), is_leaf=is_packed)[0])
    leaves = []
    if model.config.classifier is not None:
        found = _labelling(found, given, model, seed)
    for place, weight in wanted:
        name = jax.tree_util.keystr(place, simple=True, separator="/")
        if place not in found:
            raise ModelError(f"{path} has no weights for {name}, which this architecture has.")
        leaf = without_rounding(found.pop(place))
        if isinstance(leaf, Virtual):
            raise ModelError(
                f"{path} has a prompt or a prefix of {leaf.count} virtual tokens, which would be lost: start from the "
                "model that it was tuned from."
            )
        if model.adapter is not None and is_packed(leaf) and (own := as_base(leaf, weight, model.adapter)) is not None:
            leaf = own
            packed.add(name)
        leaves.append(leaf if name in packed else _fitted(unpacked(leaf), weight, given, model, name))
    if found:
        name = jax.tree_util.keystr(next(iter(found)), simple=True, separator="/")
        raise ModelError(f"{path} has weights for {name}, which this architecture does not have.")
    params = jax.tree.unflatten(jax.tree.structure(model.bare.weights), leaves)
    return _with_text(model.adapted(params, jax.random.key(seed)), model, given)


def _given(path: str | Path, model: Model, packed: set[str]) -> LanguageModel:
    """What a run starts from; names of matrices that were packed for an adapter's base, layer by layer as they were
    read, are added to `packed`.

    An adapter's base stays in the state as it was read. So it is copied from the file's memory, one array at a time:
    a step could not take that over, and would hold the base twice.
    """
    adapter = model.adapter
    if adapter is None or not is_model_directory(path):
        return language_model(path)
    flat = jax.tree_util.tree_leaves_with_path(model.bare.weights)
    weights = {jax.tree_util.keystr(place, simple=True, separator="/"): weight for place, weight in flat}

    def put(name: str, array: np.ndarray) -> Any:
        weight = weights.get(name)
        fits = weight is not None and weight.role == "matrix" and array.shape == weight.stacked_shape
        if weight is None or not fits or adapter.base == "float32":
            return jax.device_put(jnp.array(array), start()[0])
        packed.add(name)
        return held_by_layer(array, weight, adapter)

    return load_model(path, put=put)


def _with_text(params: PyTree, model: Model, given: LanguageModel) -> PyTree:
    """The parameters with the prompt that a configuration gives as a text."""
    adapter = model.adapter
    if adapter is None or adapter.prompt_text is None:
        return params
    ids = given.tokenizer.encode(adapter.prompt_text)
    if not len(ids):
        raise ConfigError(f"adapter.prompt_text has no tokens, got {adapter.prompt_text!r}: give a text.")
    prompted = params["embed"]["token"]["table"]
    assert isinstance(prompted, Prompted)
    rows = prompted.base[jnp.resize(jnp.asarray(ids, jnp.int32), (adapter.virtual_tokens,))].astype(jnp.float32)
    return {**params, "embed": {**params["embed"], "token": {"table": replace(prompted, rows=rows)}}}


def _labelling(found: dict[Any, Any], given: LanguageModel, model: Model, seed: int) -> dict[Any, Any]:
    """Weights of a model with a head for labels, by path: its own if it has the same one, else a new one.

    One that was tuned on pairs is the same for single texts.
    """
    own, wanted = given.config.classifier, model.config.classifier
    if own is not None and wanted is not None and replace(own, pairs=wanted.pairs) == wanted:
        return found
    drawn = {"head": {"classifier": model.init_classifier(jax.random.fold_in(jax.random.key(seed), 1))}}
    norm = {place: leaf for place, leaf in found.items() if place[:2] == (_key("head"), _key("norm"))}
    others = {place: leaf for place, leaf in found.items() if place[0] != _key("head")}
    return others | norm | dict(jax.tree_util.tree_flatten_with_path(drawn)[0])


def _key(name: str) -> Any:
    return jax.tree_util.DictKey(name)


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
