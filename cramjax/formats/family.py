"""A family of models of others: its configuration and its tensors, both ways, and what all families share of that.

A family reads a `config.json` into an `Architecture` and writes one that says the same, as nearly as the class can.
That it says exactly the same is judged in one place, by reading it again (`cramjax.formats.export`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cramjax.config import GATED, Activation, LayerConfig, ModelConfig, RopeScaling
from cramjax.errors import ModelError
from cramjax.formats.table import Table
from cramjax.formats.tensors import Tensors

Kind = Literal["causal", "masked", "encoder", "labels", "causal_labels"]
"""What a model predicts: the next token, hidden tokens, nothing (an encoder without a head), or labels of texts, by the
first token or in a causal model by the last (these are not exported)."""

HfConfig = Mapping[str, Any]
"""The contents of a `config.json`."""


@dataclass(frozen=True)
class Architecture:
    """What a model is, beside its weights and its tokenizer."""

    config: ModelConfig
    vocab_size: int
    """Rows of the vocabulary, without padding."""
    context: int
    """Tokens that it can see, or was trained to see."""
    kind: Kind


@dataclass(frozen=True)
class Family:
    """How one class of models is read and written."""

    name: str
    """`model_type` of its configuration."""
    classes: Mapping[Kind, str]
    """Its class for each kind of model, as transformers calls it; only these kinds are written."""
    read: Callable[[HfConfig], Architecture]
    write: Callable[[Architecture], dict[str, Any]]
    """The nearest configuration, without special tokens."""
    table: Callable[[HfConfig], Table]
    prefix: str
    """What names of tensors start with, and may lack all together."""
    ignored: Sequence[str] = ()
    """Parts of names of tensors that are constants, copies of tied weights, or of heads that we do not have."""
    view: Callable[[Tensors], Tensors] = lambda tensors: tensors
    """The tensors of some files under the names of the table."""
    head: str | None = None
    """What names of a bidirectional model's head start with; files without any hold an encoder alone."""


_READ_ACTIVATIONS: dict[str, tuple[Activation, Activation | None]] = {
    "gelu": ("gelu", "geglu"),
    "gelu_new": ("gelu_tanh", "geglu_tanh"),
    "gelu_pytorch_tanh": ("gelu_tanh", "geglu_tanh"),
    "relu2": ("relu2", None),
}
_WRITTEN: dict[Activation, str] = {
    "gelu": "gelu",
    "geglu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "geglu_tanh": "gelu_pytorch_tanh",
    "swiglu": "silu",
    "relu2": "relu2",
}


def read_activation(config: HfConfig, key: str, default: str, *, gated: bool) -> Activation:
    """Our name of an activation.

    Raises:
        ModelError: there is none.
    """
    name = config.get(key) or default
    if gated and name in ("silu", "swish"):
        return "swiglu"
    ours = _READ_ACTIVATIONS.get(name, (None, None))[gated]
    if ours is None:
        known = [theirs for theirs, pair in _READ_ACTIVATIONS.items() if pair[gated]] + ["silu"] * gated
        raise ModelError(f"{key}={name!r} has no counterpart here: {', '.join(known)} have.")
    return ours


def write_activation(config: ModelConfig, *, gated: bool) -> str:
    """Their name of an activation; of another one where the class has it not, being gated or not."""
    if (config.activation in GATED) != gated:
        return "silu" if gated else "gelu"
    return _WRITTEN[config.activation]


def require(config: HfConfig, **values: Any) -> None:
    """Refuse options that have another value than the one that our block has; an option that is not given is right.

    Raises:
        ModelError: one has.
    """
    for option, value in values.items():
        if config.get(option, value) != value:
            raise ModelError(f"the option {option}={config[option]!r} has no counterpart here, only {value!r} has.")


def need(config: HfConfig, *keys: str) -> None:
    """Refuse a configuration without some keys.

    Raises:
        ModelError: one is missing.
    """
    for key in keys:
        if not isinstance(config.get(key), int | float) or isinstance(config.get(key), bool):
            got = f"it is {config[key]!r}" if key in config else "it is missing"
            raise ModelError(
                f"config.json of model type {config.get('model_type')!r} must give {key} as a number; {got}."
            )


def read_rope(config: HfConfig, default: float, layer_type: str | None = None) -> tuple[float, RopeScaling | None]:
    """Base and scaling of rotary positions, from keys of version 4 (`rope_theta`, `rope_scaling`) or 5
    (`rope_parameters`, perhaps one for each type of layer).

    Args:
        config: theirs.
        default: base where none is given.
        layer_type: `full_attention` or `sliding_attention`, where they differ.

    Raises:
        ModelError: a scaling that is not known here.
    """
    nested = config.get("rope_parameters") or {}
    if layer_type is not None and ("full_attention" in nested or "sliding_attention" in nested):
        nested = nested.get(layer_type) or {}
    given = {**(config.get("rope_scaling") or {}), **nested}
    if layer_type == "sliding_attention" and not nested:
        given = {}
    base = float(given.get("rope_theta") or config.get("rope_theta") or default)
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise ModelError("partial_rotary_factor has no counterpart here: rotary positions turn whole heads.")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return base, None
    if kind not in ("linear", "llama3", "yarn"):
        raise ModelError(
            f"rotary positions of type {kind!r} have no counterpart here: default, linear, llama3, yarn have."
        )
    positions = config.get("max_position_embeddings")
    nested_original, own = given.get("original_max_position_embeddings"), config.get("original_max_position_embeddings")
    original = own or nested_original or positions  # as `transformers` ranks them
    factor = given.get("factor")
    if factor is None and kind == "yarn" and positions and original:
        factor = positions / original
    if factor is None:
        raise ModelError(f"rotary positions of type {kind!r} need a factor, and config.json gives none: complete it.")
    given = {**given, "factor": float(factor)}
    values: dict[str, Any] = {"kind": kind, "factor": float(factor)}
    if kind != "linear":
        values["original_positions"] = int(original or 0)
    if kind == "llama3":
        values["low_factor"], values["high_factor"] = float(given["low_freq_factor"]), float(given["high_freq_factor"])
    if kind == "yarn":
        values["beta_fast"] = float(given.get("beta_fast") or 32.0)
        values["beta_slow"] = float(given.get("beta_slow") or 1.0)
        values["truncate"] = bool(given.get("truncate", True))
        values["attention_factor"] = _yarn_factor(given)
    return base, RopeScaling(**values)


def _yarn_factor(given: Mapping[str, Any]) -> float | None:
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    scale, whole = given.get("mscale"), given.get("mscale_all_dim")
    if not (scale and whole):
        return None

    def grown(by: float) -> float:
        return 0.1 * by * math.log(given["factor"]) + 1.0 if given["factor"] > 1 else 1.0

    return grown(scale) / grown(whole)


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Base and scaling of rotary positions in keys of version 4, which version 5 reads too."""
    scaling = config.rope_scaling
    written: dict[str, Any] = {"rope_theta": config.rope_base}
    if scaling is None:
        return written
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_positions
    if scaling.kind == "llama3":
        values |= {"low_freq_factor": scaling.low_factor, "high_freq_factor": scaling.high_factor}
    if scaling.kind == "yarn":
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        if scaling.attention_factor is not None:
            values["attention_factor"] = scaling.attention_factor
    return written | {"rope_scaling": values}


def patterned(layers: Sequence[LayerConfig]) -> dict[str, Any]:
    """The fields `pattern`, `window` and `rope_base` of blocks that are given one by one.

    Blocks that are all alike need no pattern; else it is the shortest that repeats.
    """
    if all(each == LayerConfig(window=layers[0].window) for each in layers):
        return {"window": layers[0].window}
    for period in range(1, len(layers) + 1):
        if all(layers[i] == layers[i % period] for i in range(len(layers))):
            return {"pattern": tuple(layers[:period])}
    raise AssertionError("a stack is its own period")


def layers_of(config: ModelConfig) -> list[LayerConfig]:
    """The configuration of every block."""
    pattern = config.pattern
    if not pattern:
        return [LayerConfig(window=config.window)] * config.layers
    return [pattern[index % len(pattern)] for index in range(config.layers)]


def head_dim(config: ModelConfig) -> int:
    """Width of one head."""
    return config.head_dim or config.width // config.heads


def kv_heads(config: ModelConfig) -> int:
    """Heads of keys and values."""
    return config.kv_heads or config.heads
