"""NanoChat: norms without weights, also after the embedding and of queries and keys; ReLU²; a soft-cap of the logits.

Its rotation turns the other way round: the halves of each head's rows of queries and keys are swapped. It normalises
queries and keys after their rotation, which is the same as before it, for a norm without weights; but yarn's factor of
cosines and sines is then lost.
"""

from dataclasses import replace
from typing import Any

from cramjax.formats.family import Architecture, Family, HfConfig, require
from cramjax.formats.llama import IGNORED, read_common, write_common
from cramjax.formats.table import SWAPPED_HALVES, Table, linear, one


def _read(config: HfConfig) -> Architecture:
    require(config, hidden_act="relu2", attention_bias=False)
    read = read_common(
        {**config, "hidden_act": "silu"},  # which is not read
        activation="relu2",
        norm_affine=False,
        embedding_norm=True,
        qk_norm=True,
        logit_softcap=config.get("final_logit_softcapping", 15.0),
    )
    scaling = read.config.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return read
    return replace(read, config=replace(read.config, rope_scaling=replace(scaling, attention_factor=1.0)))


def _write(given: Architecture) -> dict[str, Any]:
    config = given.config
    return write_common(given) | {
        "hidden_act": "relu2",
        "final_logit_softcapping": config.logit_softcap,
        "attention_bias": False,
    }


def _table(_: HfConfig) -> Table:
    attention, mlp = "model.layers.{}.self_attn", "model.layers.{}.mlp"
    turned = linear(f"{attention}.q_proj", f"{attention}.k_proj", change=SWAPPED_HALVES)
    return {
        "embed/token/table": one("model.embed_tokens.weight"),
        "blocks/attention/qkv/kernel": (*turned, *linear(f"{attention}.v_proj")),
        "blocks/attention/out/kernel": linear(f"{attention}.o_proj"),
        "blocks/mlp/up/kernel": linear(f"{mlp}.fc1"),
        "blocks/mlp/down/kernel": linear(f"{mlp}.fc2"),
        "head/decoder/kernel": linear("lm_head"),
    }


NANOCHAT = Family("nanochat", {"causal": "NanoChatForCausalLM"}, _read, _write, _table, "model.", IGNORED)
