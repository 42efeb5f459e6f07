"""Prompts and prefixes as the library peft keeps them: one tensor, `prompt_embeddings`, both ways.

A prompt is a row for each virtual token; of a prefix, a row holds the keys and values of all layers in turn. What peft
makes prefixes with in training (`prefix_projection`) it does not save.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cramjax.errors import ModelError
from cramjax.formats.peft_modules import Base, Modules
from cramjax.formats.table import SAME, flatten, unflatten
from cramjax.formats.tensors import SafetensorsFiles, require_weights
from cramjax.kernels.packed import Prefixed, Prompted, on_base

TENSOR = "prompt_embeddings"
KINDS = {"PROMPT_TUNING": Prompted, "PREFIX_TUNING": Prefixed}
"""Names of peft's, and what they are here."""

_TABLE = "embed/token/table"

Array = np.ndarray


def read_virtual(tensors: SafetensorsFiles, config: Mapping[str, Any], given: Base) -> PyTree:
    """A model's parameters with the virtual tokens of an adapter.

    Args:
        tensors: of the adapter.
        config: its `adapter_config.json`.
        given: the model that it is for, without adapters.

    Raises:
        ModelError: the adapter is damaged, or of another model.
    """
    if set(tensors.names) != {TENSOR}:
        raise ModelError(
            f"the adapter has the tensors {', '.join(sorted(tensors.names))}, and one of type {config['peft_type']} "
            f"has {TENSOR} alone: save it again."
        )
    require_weights(tensors, TENSOR)
    submodules = config.get("num_transformer_submodules")
    if submodules not in (None, 1):
        raise ModelError(f"the adapter has num_transformer_submodules={submodules}, and models here are one.")
    leaves, made = dict(flatten(given.params)), {}
    _refuse_windows(given)
    stored, sizes = tensors.shape(TENSOR), given.model.sizes
    prompt = KINDS[config["peft_type"]] is Prompted
    width = sizes.qkv[2]
    wanted = given.model.config.width if prompt else given.model.config.layers * 2 * width
    if len(stored) != 2 or 0 in stored or stored[1] != wanted:
        raise ModelError(
            f"the tensor {TENSOR} must have shape (virtual tokens, {wanted}), got {stored}: the adapter is of another "
            "model, or damaged."
        )
    rows = tensors.read(TENSOR).astype(np.float32)
    if prompt:
        _refuse_scale(given)
        made[_TABLE] = Prompted(None, jnp.asarray(rows))
    else:
        layers = rows.reshape(len(rows), given.model.config.layers, 2, width)
        for path, numbers in _layers(given).items():
            own = layers[:, numbers].transpose(2, 1, 0, 3)
            made[path] = Prefixed(None, jnp.asarray(own[0]), jnp.asarray(own[1]))
    for path, adapter in made.items():
        leaves[path] = on_base(path, adapter, leaves[path])
    return unflatten(leaves, given.params)


def write_virtual(adapters: Mapping[str, Any], given: Base) -> tuple[dict[str, Any], dict[str, Array]]:
    """What of `adapter_config.json` says which adapter it is, and its tensors.

    Args:
        adapters: prompts, or prefixes, by path.
        given: the model that they are of.

    Raises:
        ModelError: peft has none that computes the same.
    """
    sizes, layers = given.model.sizes, given.model.config.layers
    common = {"num_transformer_submodules": 1, "num_layers": layers}
    if isinstance(prompted := adapters.get(_TABLE), Prompted):
        _refuse_scale(given)
        rows = np.asarray(prompted.rows, np.float32)
        own = {"token_dim": rows.shape[1], "num_attention_heads": sizes.heads, "prompt_tuning_init": "RANDOM"}
        return {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(rows), **common, **own}, {TENSOR: rows}
    places = _layers(given)
    tokens, width = next(iter(adapters.values())).count, sizes.qkv[2]
    rows = np.zeros((tokens, layers, 2, width), np.float32)
    for path, leaf in adapters.items():
        pair = np.stack([np.asarray(leaf.keys), np.asarray(leaf.values)])  # (2, layers, tokens, width)
        rows[:, places[path]] = pair.transpose(2, 1, 0, 3)
    own = {"token_dim": width, "num_attention_heads": sizes.kv_heads, "encoder_hidden_size": width}
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": tokens, "prefix_projection": False, **common, **own}
    return config, {TENSOR: rows.reshape(tokens, -1)}


def _layers(given: Base) -> dict[str, list[int]]:
    """Numbers of the layers that each of our projections stands for, by its path."""
    found: dict[str, list[int]] = {}
    for path, modules in Modules(given).by_path.items():
        if path.endswith("attention/qkv/kernel"):
            if any(module.piece.part.change is not SAME for module in modules):
                raise ModelError(
                    f"keys of {modules[0].name} are in another order than ours, and prefixes of peft's do not say so: "
                    "choose another adapter."
                )
            numbers = {module.piece.index or (0,): module.piece.numbers[0] for module in modules}
            found[path] = [numbers[index] for index in sorted(numbers)]
    return found


def _refuse_scale(given: Base) -> None:
    scale = given.model.config.embedding_scale
    if scale != 1:
        raise ModelError(
            f"the model multiplies its embeddings by {scale:g}, and peft's prompts are not multiplied as ours are: "
            "choose another adapter."
        )


def _refuse_windows(given: Base) -> None:
    if any(layer.window is not None for layer in given.model.period):
        raise ModelError(
            "the model has blocks with a sliding window, which would lose sight of virtual tokens: prompts and "
            "prefixes are for models without."
        )
