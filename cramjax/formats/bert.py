"""BERT, RoBERTa and ModernBERT: bidirectional models, with a head for hidden tokens or without one."""

from typing import Any

from cramjax.config import LayerConfig, ModelConfig
from cramjax.errors import ModelError
from cramjax.formats.family import (
    Architecture,
    Family,
    HfConfig,
    layers_of,
    need,
    patterned,
    read_activation,
    read_rope,
    require,
    write_activation,
)
from cramjax.formats.table import Part, Table, layer, linear, norm, one, rows_after

_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
_ROBERTA_ROWS = 2
"""Rows of RoBERTa's positions before that of the first token: its padding token is 1."""


def _read_post(config: HfConfig, positions: int, eps: float) -> Architecture:
    need(config, *_SIZES)
    require(config, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    model = ModelConfig(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        mlp=config["intermediate_size"],
        activation=read_activation(config, "hidden_act", "gelu", gated=False),
        norm_eps=config.get("layer_norm_eps", eps),
        norm_position="post",
        bias=True,
        positions="learned",
        max_positions=positions,
        token_types=config.get("type_vocab_size", 2),
        embedding_norm=True,
        final_norm=False,
        head_transform=True,
        head_bias=True,
        tied=config.get("tie_word_embeddings", True),
    )
    return Architecture(model, config["vocab_size"], positions, "masked")


def _read_bert(config: HfConfig) -> Architecture:
    need(config, "max_position_embeddings")
    if "BertModel" not in (config.get("architectures") or ()):
        require(config, hidden_act="gelu")  # which the class has in its head too, and ours has there always
    return _read_post(config, config["max_position_embeddings"], 1e-12)


def _read_roberta(config: HfConfig) -> Architecture:
    need(config, "max_position_embeddings")
    require(config, pad_token_id=_ROBERTA_ROWS - 1)
    return _read_post(config, config["max_position_embeddings"] - _ROBERTA_ROWS, 1e-12)


def _write_bert(given: Architecture) -> dict[str, Any]:
    written = _write_post(given)
    return written if given.kind == "encoder" else written | {"hidden_act": "gelu"}


def _write_post(given: Architecture) -> dict[str, Any]:
    config = given.config
    return {
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp,
        "hidden_act": write_activation(config, gated=False),
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions or given.context,
        "type_vocab_size": config.token_types or 1,
        "tie_word_embeddings": config.tied,
        "vocab_size": given.vocab_size,
    }


def _write_roberta(given: Architecture) -> dict[str, Any]:
    written = _write_post(given)
    rows = written["max_position_embeddings"] + _ROBERTA_ROWS
    return written | {"max_position_embeddings": rows, "pad_token_id": _ROBERTA_ROWS - 1}


def _encoder(name: str) -> dict[str, Any]:
    block = f"{name}.encoder.layer.{{}}"
    return {
        "embed/token/table": one(f"{name}.embeddings.word_embeddings.weight"),
        "embed/position/table": one(f"{name}.embeddings.position_embeddings.weight"),
        "embed/token_type/table": one(f"{name}.embeddings.token_type_embeddings.weight"),
        **norm("embed/norm", f"{name}.embeddings.LayerNorm"),
        **layer("blocks/attention/qkv", *(f"{block}.attention.self.{x}" for x in ("query", "key", "value"))),
        **layer("blocks/attention/out", f"{block}.attention.output.dense"),
        **norm("blocks/attention_norm", f"{block}.attention.output.LayerNorm"),
        **layer("blocks/mlp/up", f"{block}.intermediate.dense"),
        **layer("blocks/mlp/down", f"{block}.output.dense"),
        **norm("blocks/mlp_norm", f"{block}.output.LayerNorm"),
    }


def _bert_table(config: HfConfig) -> Table:
    return _encoder("bert") | {
        **layer("head/transform/dense", "cls.predictions.transform.dense"),
        **norm("head/transform/norm", "cls.predictions.transform.LayerNorm"),
        "head/decoder/kernel": linear("cls.predictions.decoder"),
        "head/decoder/bias": _decoder_bias(config, "cls.predictions"),
    }


def _roberta_table(config: HfConfig) -> Table:
    positions = one("roberta.embeddings.position_embeddings.weight", rows_after(_ROBERTA_ROWS))
    return _encoder("roberta") | {
        "embed/position/table": positions,
        **layer("head/transform/dense", "lm_head.dense"),
        **norm("head/transform/norm", "lm_head.layer_norm"),
        "head/decoder/kernel": linear("lm_head.decoder"),
        "head/decoder/bias": _decoder_bias(config, "lm_head"),
    }


def _decoder_bias(config: HfConfig, head: str) -> tuple[Part, ...]:
    """The bias that is added to the logits: it has two names, and where the decoder is not tied, perhaps two values."""
    outer, inner = f"{head}.bias", f"{head}.decoder.bias"
    return one(outer) if config.get("tie_word_embeddings", True) else (Part(inner, copy=outer),)


def _read_modernbert(config: HfConfig) -> Architecture:
    need(config, *_SIZES)
    require(config, classifier_activation="gelu")
    biased = config.get("attention_bias", False)
    require(config, mlp_bias=biased)
    layers, every = config["num_hidden_layers"], config.get("global_attn_every_n_layers", 3)
    default = ["sliding_attention" if index % every else "full_attention" for index in range(layers)]
    base, scaling = read_rope(
        {"rope_theta": config.get("global_rope_theta"), **_ropes(config)}, 160_000.0, "full_attention"
    )
    local, local_scaling = read_rope(
        {"rope_theta": config.get("local_rope_theta"), **_ropes(config)}, 10_000.0, "sliding_attention"
    )
    if local_scaling is not None or scaling is not None:
        raise ModelError("scaled rotary positions of ModernBERT have no counterpart here.")
    blocks = []
    for index, type_ in enumerate(config.get("layer_types") or default):
        block = {"window": config.get("local_attention", 128) // 2 + 1, "rope_base": local, "rope_scaled": False}
        blocks.append(LayerConfig(**(block if type_ == "sliding_attention" else {}), attention_norm=index > 0))
    model = ModelConfig(
        layers=layers,
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        mlp=config["intermediate_size"],
        activation=read_activation(config, "hidden_activation", "gelu", gated=True),
        norm_eps=config.get("norm_eps", 1e-5),
        norm_bias=config.get("norm_bias", False),
        bias=biased,
        positions="rotary",
        rope_base=base,
        embedding_norm=True,
        head_transform=True,
        head_transform_bias=config.get("classifier_bias", False),
        head_bias=config.get("decoder_bias", True),
        tied=config.get("tie_word_embeddings", True),
        **patterned(blocks),
    )
    return Architecture(model, config["vocab_size"], config.get("max_position_embeddings", 8192), "masked")


def _ropes(config: HfConfig) -> dict[str, Any]:
    return {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)}


def _write_modernbert(given: Architecture) -> dict[str, Any]:
    config, blocks = given.config, layers_of(given.config)
    local = next((block for block in blocks if block.window), LayerConfig(window=65, rope_base=10_000.0))
    return {
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp,
        "hidden_activation": write_activation(config, gated=True),
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "classifier_bias": config.head_transform_bias,
        "classifier_activation": "gelu",
        "decoder_bias": config.head_bias,
        "layer_types": ["full_attention" if block.window is None else "sliding_attention" for block in blocks],
        # 4.48 to 4.57 read this in the place of layer_types.
        "global_attn_every_n_layers": next((i for i, block in enumerate(blocks) if i and block.window is None), 3),
        "local_attention": 2 * ((local.window or 65) - 1),
        "global_rope_theta": config.rope_base,
        "local_rope_theta": local.rope_base or config.rope_base,
        "max_position_embeddings": given.context,
        "tie_word_embeddings": config.tied,
        "vocab_size": given.vocab_size,
    }


def _modernbert_table(_: HfConfig) -> Table:
    block = "model.layers.{}"
    return {
        "embed/token/table": one("model.embeddings.tok_embeddings.weight"),
        **norm("embed/norm", "model.embeddings.norm"),
        **norm("blocks/attention_norm", f"{block}.attn_norm"),
        **layer("blocks/attention/qkv", f"{block}.attn.Wqkv"),
        **layer("blocks/attention/out", f"{block}.attn.Wo"),
        **norm("blocks/mlp_norm", f"{block}.mlp_norm"),
        **layer("blocks/mlp/up", f"{block}.mlp.Wi"),
        **layer("blocks/mlp/down", f"{block}.mlp.Wo"),
        **norm("head/norm", "model.final_norm"),
        **layer("head/transform/dense", "head.dense"),
        **norm("head/transform/norm", "head.norm"),
        **layer("head/decoder", "decoder"),
    }


BERT = Family(
    name="bert",
    classes={"masked": "BertForMaskedLM", "encoder": "BertModel"},
    read=_read_bert,
    write=_write_bert,
    table=_bert_table,
    prefix="bert.",
    ignored=("cls.predictions.decoder.", "cls.predictions.bias", "cls.seq_relationship.", "pooler.", ".position_ids"),
    head="cls.predictions.",
)
ROBERTA = Family(
    name="roberta",
    classes={"masked": "RobertaForMaskedLM", "encoder": "RobertaModel"},
    read=_read_roberta,
    write=_write_roberta,
    table=_roberta_table,
    prefix="roberta.",
    ignored=("lm_head.decoder.", "lm_head.bias", "pooler.", ".position_ids"),
    head="lm_head.",
)
MODERNBERT = Family(
    name="modernbert",
    classes={"masked": "ModernBertForMaskedLM", "encoder": "ModernBertModel"},
    read=_read_modernbert,
    write=_write_modernbert,
    table=_modernbert_table,
    prefix="model.",
    ignored=("decoder.weight",),
    head="head.",
)
