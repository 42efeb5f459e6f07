"""Llama and its relatives: RMSNorm before each sublayer, rotary positions, gated feed-forward layers.

Mistral adds a window, SmolLM3 leaves rotary positions out of some layers, Qwen2 has biases of queries, keys and values,
and Qwen3 norms of queries and keys.
"""

from typing import Any

from cramjax.config import Activation, LayerConfig, ModelConfig
from cramjax.formats.family import (
    Architecture,
    Family,
    HfConfig,
    head_dim,
    kv_heads,
    layers_of,
    need,
    patterned,
    read_activation,
    read_rope,
    require,
    write_activation,
    write_rope,
)
from cramjax.formats.table import Part, Table, layer, linear, norm, one

IGNORED = ("lm_head.weight", ".rotary_emb.inv_freq")


def read_common(config: HfConfig, *, base: float = 10_000.0, positions: int = 2048, **fields: Any) -> Architecture:
    """An architecture of Llama's shape.

    Args:
        config: theirs.
        base: of rotary positions, where none is given.
        positions: context, where none is given.
        fields: of our configuration that differ from Llama's.
    """
    need(config, "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    base, scaling = read_rope(config, base)
    values: dict[str, Any] = {
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "mlp": config["intermediate_size"],
        "activation": _read_activation(config),
        "norm": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "positions": "rotary",
        "rope_base": base,
        "rope_scaling": scaling,
        "tied": config.get("tie_word_embeddings", False),
        **fields,
    }
    context = config.get("max_position_embeddings", positions)
    return Architecture(ModelConfig(**values), config["vocab_size"], context, "causal")


def write_common(given: Architecture) -> dict[str, Any]:
    """What all configurations of Llama's shape say."""
    config = given.config
    return {
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": kv_heads(config),
        "head_dim": head_dim(config),
        "intermediate_size": config.mlp,
        "hidden_act": "relu" if config.activation == "relu2" else write_activation(config, gated=True),
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": given.context,
        "tie_word_embeddings": config.tied,
        "vocab_size": given.vocab_size,
        "attention_dropout": 0.0,
        **write_rope(config),
    }


def _read_activation(config: HfConfig) -> Activation:
    # relu(Wx) · Wx is ReLU² of Wx: a layer whose gate is its other half, which reading checks.
    return "relu2" if config.get("hidden_act") == "relu" else read_activation(config, "hidden_act", "silu", gated=True)


def common_table(config: HfConfig) -> dict[str, Any]:
    """The tensors of Llama's shape."""
    block = "model.layers.{}"
    up: dict[str, Any] = layer("blocks/mlp/up", f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")
    if config.get("hidden_act") == "relu":
        part = Part(f"{block}.mlp.gate_proj.weight", transposed=True, twin=f"{block}.mlp.up_proj.weight")
        up = {"blocks/mlp/up/kernel": (part,)}
    return {
        "embed/token/table": one("model.embed_tokens.weight"),
        **norm("blocks/attention_norm", f"{block}.input_layernorm"),
        **layer("blocks/attention/qkv", *(f"{block}.self_attn.{x}_proj" for x in "qkv")),
        "blocks/attention/query_norm/weight": one(f"{block}.self_attn.q_norm.weight"),
        "blocks/attention/key_norm/weight": one(f"{block}.self_attn.k_norm.weight"),
        **layer("blocks/attention/out", f"{block}.self_attn.o_proj"),
        **norm("blocks/mlp_norm", f"{block}.post_attention_layernorm"),
        **up,
        **layer("blocks/mlp/down", f"{block}.mlp.down_proj"),
        **norm("head/norm", "model.norm"),
        "head/decoder/kernel": linear("lm_head"),
    }


def _table(config: HfConfig) -> Table:
    return common_table(config)


def _read_llama(config: HfConfig) -> Architecture:
    biased = config.get("attention_bias", False)
    require(config, mlp_bias=biased)
    return read_common(config, bias=biased)


def _write_llama(given: Architecture) -> dict[str, Any]:
    return write_common(given) | {"attention_bias": given.config.bias, "mlp_bias": given.config.bias}


def _read_mistral(config: HfConfig) -> Architecture:
    return read_common(config, positions=4096 * 32, window=config.get("sliding_window", 4096))


def _write_mistral(given: Architecture) -> dict[str, Any]:
    return write_common(given) | {"sliding_window": given.config.window}


def _read_smollm3(config: HfConfig) -> Architecture:
    require(config, mlp_bias=config.get("attention_bias", False))
    layers, every = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    turning = config.get("no_rope_layers") or [int((index + 1) % every != 0) for index in range(layers)]
    types = config.get("layer_types") or ["full_attention"] * layers
    if config.get("use_sliding_window") and config.get("sliding_window") and not config.get("layer_types"):
        types = ["full_attention" if turns else "sliding_attention" for turns in turning]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    blocks = [
        LayerConfig(window=window if type_ == "sliding_attention" else None, rotary=bool(turns))
        for type_, turns in zip(types, turning, strict=False)
    ]
    fields = {"tied": config.get("tie_word_embeddings", True), "bias": config.get("attention_bias", False)}
    return read_common(config, base=2_000_000.0, positions=32_768, **fields, **patterned(blocks))


def _write_smollm3(given: Architecture) -> dict[str, Any]:
    config, blocks = given.config, layers_of(given.config)
    window = _one_window(blocks)
    return write_common(given) | {
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": _types(blocks),
        "no_rope_layers": [int(block.rotary) for block in blocks],
    }


def _read_qwen(config: HfConfig, **fields: Any) -> Architecture:
    layers = config.get("num_hidden_layers", 0)
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    default = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(layers)]
    types = config.get("layer_types") or default
    blocks = [LayerConfig(window=window if type_ == "sliding_attention" else None) for type_ in types]
    return read_common(config, positions=32_768, **patterned(blocks), **fields)


def _write_qwen(given: Architecture) -> dict[str, Any]:
    blocks = layers_of(given.config)
    window = _one_window(blocks)
    return write_common(given) | {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": next((i for i, block in enumerate(blocks) if block.window), given.config.layers),
        "layer_types": _types(blocks),
    }


def _read_qwen2(config: HfConfig) -> Architecture:
    return _read_qwen({**config, "head_dim": None}, qkv_bias=True)


def _write_qwen2(given: Architecture) -> dict[str, Any]:
    written = _write_qwen(given)
    del written["head_dim"]  # the class divides the width
    return written


def _read_qwen3(config: HfConfig) -> Architecture:
    fields = {"bias": config.get("attention_bias", False), "qk_norm": True, "qk_norm_weight": True}
    require(config, attention_bias=False)
    return _read_qwen({**config, "head_dim": config.get("head_dim", 128)}, **fields)


def _write_qwen3(given: Architecture) -> dict[str, Any]:
    return _write_qwen(given) | {"attention_bias": False}


def _one_window(blocks: list[LayerConfig]) -> int | None:
    """The window of the blocks that have one: configurations have a single number for all of them."""
    return next((block.window for block in blocks if block.window is not None), None)


def _types(blocks: list[LayerConfig]) -> list[str]:
    return ["full_attention" if block.window is None else "sliding_attention" for block in blocks]


def _family(name: str, class_: str, read: Any, write: Any, table: Any = _table) -> Family:
    return Family(name, {"causal": class_}, read, write, table, "model.", IGNORED)


LLAMA = _family("llama", "LlamaForCausalLM", _read_llama, _write_llama)
MISTRAL = _family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral)
SMOLLM3 = _family("smollm3", "SmolLM3ForCausalLM", _read_smollm3, _write_smollm3)
QWEN2 = _family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2)
QWEN3 = _family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3)
