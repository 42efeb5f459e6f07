"""Weights and configurations of `transformers` models (GPT-2, Llama, BERT) as ours, from dicts of numpy arrays."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cramjax.config import Activation, ModelConfig
from cramjax.errors import ConfigError
from cramjax.model.stack import Model


class _Source(NamedTuple):
    """Where a parameter of ours comes from."""

    names: tuple[str, ...]
    """Their names, joined along the last axis; `{}` stands for the layer."""
    transposed: bool = False
    """Whether they are stored (out, in)."""


def _one(name: str) -> _Source:
    return _Source((name,))


def _linear(*names: str) -> _Source:
    return _Source(tuple(f"{name}.weight" for name in names), transposed=True)


def _biases(*names: str) -> _Source:
    return _Source(tuple(f"{name}.bias" for name in names))


def _norm(ours: str, theirs: str) -> dict[str, _Source]:
    return {f"{ours}/{part}": _one(f"{theirs}.{part}") for part in ("weight", "bias")}


_GPT2 = {
    "embed/token/table": _one("transformer.wte.weight"),
    "embed/position/table": _one("transformer.wpe.weight"),
    **_norm("blocks/attention_norm", "transformer.h.{}.ln_1"),
    "blocks/attention/qkv/kernel": _one("transformer.h.{}.attn.c_attn.weight"),
    "blocks/attention/qkv/bias": _one("transformer.h.{}.attn.c_attn.bias"),
    "blocks/attention/out/kernel": _one("transformer.h.{}.attn.c_proj.weight"),
    "blocks/attention/out/bias": _one("transformer.h.{}.attn.c_proj.bias"),
    **_norm("blocks/mlp_norm", "transformer.h.{}.ln_2"),
    "blocks/mlp/up/kernel": _one("transformer.h.{}.mlp.c_fc.weight"),
    "blocks/mlp/up/bias": _one("transformer.h.{}.mlp.c_fc.bias"),
    "blocks/mlp/down/kernel": _one("transformer.h.{}.mlp.c_proj.weight"),
    "blocks/mlp/down/bias": _one("transformer.h.{}.mlp.c_proj.bias"),
    **_norm("head/norm", "transformer.ln_f"),
    "head/decoder/kernel": _linear("lm_head"),
}

_LLAMA_ATTENTION = "model.layers.{}.self_attn"
_LLAMA = {
    "embed/token/table": _one("model.embed_tokens.weight"),
    "blocks/attention_norm/weight": _one("model.layers.{}.input_layernorm.weight"),
    "blocks/attention/qkv/kernel": _linear(*(f"{_LLAMA_ATTENTION}.{x}_proj" for x in "qkv")),
    "blocks/attention/out/kernel": _linear(f"{_LLAMA_ATTENTION}.o_proj"),
    "blocks/mlp_norm/weight": _one("model.layers.{}.post_attention_layernorm.weight"),
    "blocks/mlp/up/kernel": _linear("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "blocks/mlp/down/kernel": _linear("model.layers.{}.mlp.down_proj"),
    "head/norm/weight": _one("model.norm.weight"),
    "head/decoder/kernel": _linear("lm_head"),
}

_BERT_LAYER = "bert.encoder.layer.{}"
_BERT_QKV = tuple(f"{_BERT_LAYER}.attention.self.{x}" for x in ("query", "key", "value"))
_BERT = {
    "embed/token/table": _one("bert.embeddings.word_embeddings.weight"),
    "embed/position/table": _one("bert.embeddings.position_embeddings.weight"),
    "embed/token_type/table": _one("bert.embeddings.token_type_embeddings.weight"),
    **_norm("embed/norm", "bert.embeddings.LayerNorm"),
    "blocks/attention/qkv/kernel": _linear(*_BERT_QKV),
    "blocks/attention/qkv/bias": _biases(*_BERT_QKV),
    "blocks/attention/out/kernel": _linear(f"{_BERT_LAYER}.attention.output.dense"),
    "blocks/attention/out/bias": _biases(f"{_BERT_LAYER}.attention.output.dense"),
    **_norm("blocks/attention_norm", f"{_BERT_LAYER}.attention.output.LayerNorm"),
    "blocks/mlp/up/kernel": _linear(f"{_BERT_LAYER}.intermediate.dense"),
    "blocks/mlp/up/bias": _biases(f"{_BERT_LAYER}.intermediate.dense"),
    "blocks/mlp/down/kernel": _linear(f"{_BERT_LAYER}.output.dense"),
    "blocks/mlp/down/bias": _biases(f"{_BERT_LAYER}.output.dense"),
    **_norm("blocks/mlp_norm", f"{_BERT_LAYER}.output.LayerNorm"),
    "head/transform/dense/kernel": _linear("cls.predictions.transform.dense"),
    "head/transform/dense/bias": _biases("cls.predictions.transform.dense"),
    **_norm("head/transform/norm", "cls.predictions.transform.LayerNorm"),
    "head/decoder/bias": _one("cls.predictions.bias"),
}

_TABLES = {"gpt2": _GPT2, "llama": _LLAMA, "bert": _BERT}

# Entries of state dicts that are constants, copies of tied weights, or belong to heads that we do not have.
_IGNORED = (
    "lm_head.weight",
    "cls.predictions.decoder.",
    "cls.seq_relationship.",
    "bert.pooler.",
    ".attn.bias",
    ".attn.masked_bias",
    ".position_ids",
    ".rotary_emb.inv_freq",
)

_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def config_from_transformers(config: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a `transformers` model.

    Args:
        config: contents of its `config.json`, or `PretrainedConfig.to_dict()`.

    Raises:
        ConfigError: a model type or an option that has no counterpart here.
    """
    match config.get("model_type"):
        case "gpt2":
            for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
                _require(config, option, False)
            _require(config, "scale_attn_weights", True)
            return ModelConfig(
                layers=config["n_layer"],
                width=config["n_embd"],
                heads=config["n_head"],
                mlp=config.get("n_inner") or 4 * config["n_embd"],
                activation=_activation(config["activation_function"]),
                norm_eps=config["layer_norm_epsilon"],
                bias=True,
                positions="learned",
                max_positions=config["n_positions"],
                tied=config.get("tie_word_embeddings", True),
                depth_scaled_init=True,
            )
        case "llama":
            for option in ("attention_bias", "mlp_bias"):
                _require(config, option, False)
            _require(config, "hidden_act", "silu")
            rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10_000.0)}
            _require(rope, "rope_type", "default")
            _require(config, "rope_scaling", None)
            return ModelConfig(
                layers=config["num_hidden_layers"],
                width=config["hidden_size"],
                heads=config["num_attention_heads"],
                kv_heads=config.get("num_key_value_heads"),
                head_dim=config.get("head_dim"),
                mlp=config["intermediate_size"],
                activation="swiglu",
                norm="rmsnorm",
                norm_eps=config["rms_norm_eps"],
                positions="rotary",
                rope_base=rope["rope_theta"],
                tied=config.get("tie_word_embeddings", False),
            )
        case "bert":
            for option in ("is_decoder", "add_cross_attention"):
                _require(config, option, False)
            _require(config, "position_embedding_type", "absolute")
            return ModelConfig(
                layers=config["num_hidden_layers"],
                width=config["hidden_size"],
                heads=config["num_attention_heads"],
                mlp=config["intermediate_size"],
                activation=_activation(config["hidden_act"]),
                norm_eps=config["layer_norm_eps"],
                norm_position="post",
                bias=True,
                positions="learned",
                max_positions=config["max_position_embeddings"],
                token_types=config["type_vocab_size"],
                embedding_norm=True,
                final_norm=False,
                head_transform=True,
                head_bias=True,
            )
        case other:
            raise ConfigError(f"Weights of model type {other!r} cannot be read: choose from {', '.join(_TABLES)}.")


def params_from_transformers(state: Mapping[str, np.ndarray], model_type: str, model: Model) -> PyTree:
    """The parameters of a model from the state dict of a `transformers` language model.

    Args:
        state: name → array, as in `GPT2LMHeadModel`, `LlamaForCausalLM` or `BertForMaskedLM`.
        model_type: `gpt2`, `llama` or `bert`.
        model: made from `config_from_transformers`; its rows of padding are filled with zeros.

    Raises:
        ConfigError: an entry is missing, has another shape, or has no place.
    """
    if model_type not in _TABLES:
        raise ConfigError(f"Weights of model type {model_type!r} cannot be read: choose from {', '.join(_TABLES)}.")
    unread = {name: np.asarray(array) for name, array in state.items()}

    def fill(tree: PyTree, path: str) -> PyTree:
        if isinstance(tree, dict):
            return {key: fill(value, f"{path}/{key}" if path else key) for key, value in tree.items()}
        source = _TABLES[model_type].get(path)
        if source is None:
            raise ConfigError(f"A {model_type} model has no {path}: make the model from config_from_transformers.")
        if path.startswith("blocks/"):
            array = np.stack([_read(unread, source, layer) for layer in range(model.config.layers)])
        else:
            array = _read(unread, source, None)
        return jnp.asarray(_padded(array, tree.shape, path), tree.dtype)

    params = fill(model.abstract_params(), "")
    strangers = [name for name in unread if not any(part in name for part in _IGNORED)]
    if strangers:
        raise ConfigError(f"The state dict has entries that the model has no place for: {', '.join(strangers[:5])}.")
    return params


def _read(unread: dict[str, np.ndarray], source: _Source, layer: int | None) -> np.ndarray:
    parts = []
    for template in source.names:
        name = template.format(layer)
        if name not in unread:
            raise ConfigError(f"The state dict has no {name}.")
        array = unread.pop(name)
        parts.append(array.T if source.transposed else array)
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _padded(array: np.ndarray, shape: tuple[int, ...], path: str) -> np.ndarray:
    """Fill up the vocabulary's axis with zeros; all other axes must fit."""
    vocabulary = {"embed/token/table": 0, "head/decoder/kernel": 1, "head/decoder/bias": 0}.get(path)
    fits = array.ndim == len(shape) and all(
        had == wanted or (axis == vocabulary and had < wanted)
        for axis, (had, wanted) in enumerate(zip(array.shape, shape, strict=True))
    )
    if not fits:
        raise ConfigError(f"{path} must have shape {shape}, got {array.shape} from the state dict.")
    return np.pad(array, [(0, wanted - had) for had, wanted in zip(array.shape, shape, strict=True)])


def _activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise ConfigError(f"The activation {name!r} has no counterpart here: {', '.join(_ACTIVATIONS)} have.")
    return _ACTIVATIONS[name]


def _require(config: Mapping[str, Any], option: str, value: Any) -> None:
    if config.get(option, value) != value:
        raise ConfigError(f"The option {option}={config[option]!r} has no counterpart here, only {value!r} has.")
