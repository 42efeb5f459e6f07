"""Gemma 2 and 3 (text): norms of 1 + w before and after each sublayer, scaled embeddings, windows, soft-caps."""

import math
from typing import Any

from cramjax.config import LayerConfig
from cramjax.formats.family import (
    Architecture,
    Family,
    HfConfig,
    head_dim,
    layers_of,
    need,
    patterned,
    read_activation,
    read_rope,
    require,
    write_activation,
)
from cramjax.formats.llama import IGNORED, common_table, read_common, write_common
from cramjax.formats.table import ONE_MORE, Table, norm, one


def _read(config: HfConfig, blocks: list[LayerConfig], **fields: Any) -> Architecture:
    need(config, "num_hidden_layers", "hidden_size", "num_attention_heads")
    require(config, attention_bias=False)
    if config.get("use_bidirectional_attention"):
        require(config, use_bidirectional_attention=False)
    given = {"num_key_value_heads": 4, "head_dim": 256, **config, "hidden_act": "silu"}
    return read_common(
        given,
        activation=read_activation(config, "hidden_activation", "gelu_pytorch_tanh", gated=True),
        norm_position="sandwich",
        embedding_scale=math.sqrt(config["hidden_size"]),
        attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=config.get("attn_logit_softcapping", fields.pop("softcap", None)),
        tied=config.get("tie_word_embeddings", True),
        **patterned(blocks),
        **fields,
    )


def _read_gemma2(config: HfConfig) -> Architecture:
    types = _types(config, 2)
    blocks = [_block(config, type_) for type_ in types]
    cap = config.get("final_logit_softcapping", 30.0)
    return _read(config, blocks, positions=8192, softcap=50.0, logit_softcap=cap)


def _read_gemma3(config: HfConfig) -> Architecture:
    require(config, attn_logit_softcapping=None)  # which the class would not compute
    types = _types(config, config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    base, scaling = read_rope(config, 1_000_000.0, "full_attention")
    local, local_scaling = read_rope(
        {**config, "rope_theta": config.get("rope_local_base_freq", 10_000.0)}, 10_000.0, "sliding_attention"
    )
    require({"rope_scaling of sliding layers": local_scaling}, **{"rope_scaling of sliding layers": None})
    blocks = [
        LayerConfig(window=_window(config), rope_base=local, rope_scaled=False)
        if type_ == "sliding_attention"
        else LayerConfig()
        for type_ in types
    ]
    fields = {"rope_base": base, "rope_scaling": scaling, "qk_norm": True, "qk_norm_weight": True}
    cap = config.get("final_logit_softcapping")
    plain = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    return _read(plain, blocks, positions=131_072, logit_softcap=cap, **fields)


def _types(config: HfConfig, every: int) -> list[str]:
    layers = config.get("num_hidden_layers", 0)
    default = ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(layers)]
    return config.get("layer_types") or default


def _window(config: HfConfig) -> int:
    return config.get("sliding_window") or 4096


def _block(config: HfConfig, type_: str) -> LayerConfig:
    return LayerConfig(window=_window(config) if type_ == "sliding_attention" else None)


def _write(given: Architecture) -> dict[str, Any]:
    config, blocks = given.config, layers_of(given.config)
    scale = config.attention_scale or head_dim(config) ** -0.5
    scalar = scale**-2
    written = write_common(given)
    del written["hidden_act"]
    return written | {
        "hidden_activation": write_activation(config, gated=True),
        "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-9) else scalar,
        "sliding_window": next((block.window for block in blocks if block.window), 4096),
        "layer_types": ["full_attention" if block.window is None else "sliding_attention" for block in blocks],
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "attention_bias": False,
    }


def _write_gemma3(given: Architecture) -> dict[str, Any]:
    written, local = _write(given), next((b.rope_base for b in layers_of(given.config) if b.window), None)
    return written | {
        "attn_logit_softcapping": None,  # the class has the field and does not compute it
        "rope_local_base_freq": local or 10_000.0,
        "use_bidirectional_attention": False,
    }


def _table(config: HfConfig) -> Table:
    block = "model.layers.{}"
    return common_table(config) | {
        **norm("blocks/attention_norm", f"{block}.input_layernorm", ONE_MORE),
        **norm("blocks/attention_out_norm", f"{block}.post_attention_layernorm", ONE_MORE),
        **norm("blocks/mlp_norm", f"{block}.pre_feedforward_layernorm", ONE_MORE),
        **norm("blocks/mlp_out_norm", f"{block}.post_feedforward_layernorm", ONE_MORE),
        "blocks/attention/query_norm/weight": one(f"{block}.self_attn.q_norm.weight", ONE_MORE),
        "blocks/attention/key_norm/weight": one(f"{block}.self_attn.k_norm.weight", ONE_MORE),
        **norm("head/norm", "model.norm", ONE_MORE),
    }


GEMMA2 = Family("gemma2", {"causal": "Gemma2ForCausalLM"}, _read_gemma2, _write, _table, "model.", IGNORED)
GEMMA3 = Family("gemma3_text", {"causal": "Gemma3ForCausalLM"}, _read_gemma3, _write_gemma3, _table, "model.", IGNORED)
