"""GPT-2: LayerNorm before each sublayer, learned positions, biases everywhere; matrices are stored as ours are."""

from typing import Any

from cramjax.config import ModelConfig
from cramjax.formats.family import Architecture, Family, HfConfig, need, read_activation, require, write_activation
from cramjax.formats.table import Table, linear, norm, one


def _read(config: HfConfig) -> Architecture:
    need(config, "n_layer", "n_embd", "n_head", "n_positions", "vocab_size")
    require(config, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, scale_attn_weights=True)
    model = ModelConfig(
        layers=config["n_layer"],
        width=config["n_embd"],
        heads=config["n_head"],
        mlp=config.get("n_inner") or 4 * config["n_embd"],
        activation=read_activation(config, "activation_function", "gelu_new", gated=False),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        bias=True,
        positions="learned",
        max_positions=config["n_positions"],
        tied=config.get("tie_word_embeddings", True),
        depth_scaled_init=True,
    )
    return Architecture(model, config["vocab_size"], config["n_positions"], "causal")


def _write(given: Architecture) -> dict[str, Any]:
    config = given.config
    return {
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.mlp,
        "n_positions": config.max_positions or given.context,
        "activation_function": "gelu_new"
        if config.activation == "gelu_tanh"
        else write_activation(config, gated=False),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "vocab_size": given.vocab_size,
    }


def _table(_: HfConfig) -> Table:
    layer = "transformer.h.{}"
    return {
        "embed/token/table": one("transformer.wte.weight"),
        "embed/position/table": one("transformer.wpe.weight"),
        **norm("blocks/attention_norm", f"{layer}.ln_1"),
        "blocks/attention/qkv/kernel": one(f"{layer}.attn.c_attn.weight"),
        "blocks/attention/qkv/bias": one(f"{layer}.attn.c_attn.bias"),
        "blocks/attention/out/kernel": one(f"{layer}.attn.c_proj.weight"),
        "blocks/attention/out/bias": one(f"{layer}.attn.c_proj.bias"),
        **norm("blocks/mlp_norm", f"{layer}.ln_2"),
        "blocks/mlp/up/kernel": one(f"{layer}.mlp.c_fc.weight"),
        "blocks/mlp/up/bias": one(f"{layer}.mlp.c_fc.bias"),
        "blocks/mlp/down/kernel": one(f"{layer}.mlp.c_proj.weight"),
        "blocks/mlp/down/bias": one(f"{layer}.mlp.c_proj.bias"),
        **norm("head/norm", "transformer.ln_f"),
        "head/decoder/kernel": linear("lm_head"),
    }


GPT2 = Family(
    name="gpt2",
    classes={"causal": "GPT2LMHeadModel"},
    read=_read,
    write=_write,
    table=_table,
    prefix="transformer.",
    ignored=("lm_head.weight", ".attn.bias", ".attn.masked_bias"),
)
