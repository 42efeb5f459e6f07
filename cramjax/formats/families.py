"""All families, and which one a configuration is of."""

import difflib
from collections.abc import Mapping

from cramjax.config import DataConfig, ObjectiveConfig, RunConfig
from cramjax.errors import ConfigError, ModelError
from cramjax.formats.bert import BERT, MODERNBERT, ROBERTA
from cramjax.formats.experts import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from cramjax.formats.family import Architecture, Family, HfConfig
from cramjax.formats.gemma import GEMMA2, GEMMA3
from cramjax.formats.gpt2 import GPT2
from cramjax.formats.llama import LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3
from cramjax.formats.nanochat import NANOCHAT
from cramjax.recipes import validate

# In the order in which an export tries them: the plain ones first.
_CAUSAL = (GPT2, LLAMA, MISTRAL, NANOCHAT, QWEN2, QWEN3, SMOLLM3, GEMMA2, GEMMA3, MIXTRAL, QWEN2_MOE, QWEN3_MOE)
_ALL = (*_CAUSAL, BERT, ROBERTA, MODERNBERT)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}

# What keeps near relatives out.
_LACKS = {
    "gemma": "Gemma 1: convert it with a release that has it, or take Gemma 2 or 3",
    "gemma3": "Gemma 3 with images: give the text model alone (270m, 1b), whose model_type is gemma3_text",
    "olmoe": "its norms of queries and keys are over all heads together, and here each head has its own",
    "deepseek_v2": "its attention reads keys and values from a narrower stream, which is not here",
    "deepseek_v3": "its attention reads keys and values from a narrower stream, which is not here",
    "gpt_oss": "its attention has sinks and its experts have biases, which are not here",
    "phi3": "its rotary positions turn a part of each head, which is not here",
    "gpt_neox": "its two sublayers read the same stream, which is not here",
    "deberta-v2": "its attention has relative positions, which are not here",
    "distilbert": "its tensors have other names: there is no table of them yet",
    "t5": "it has an encoder and a decoder, and one stack is here",
}


def family_of(config: HfConfig) -> Family:
    """The family of a configuration.

    Raises:
        ModelError: it is of none; near ones are named.
    """
    name = config.get("model_type")
    if not isinstance(name, str):
        raise ModelError("config.json has no model_type: it is not the configuration of a language model.")
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=2, cutoff=0.5)
        why = f" ({_LACKS[name]})" if name in _LACKS else f"; near it are {' and '.join(near)}" if near else ""
        raise ModelError(f"Weights of model type {name!r} cannot be read{why}: choose from {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def read_architecture(config: HfConfig) -> Architecture:
    """Our architecture of a `config.json`.

    Raises:
        ModelError: its family is unknown, or an option of it has no counterpart or cannot be.
    """
    family = family_of(config)
    try:
        architecture = family.read(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"config.json is not one of model type {family.name!r}: {what}.") from None
    kind = "causal" if architecture.kind == "causal" else "masked"
    try:
        validate(
            RunConfig(
                model=architecture.config,
                data=DataConfig(sequence_length=architecture.context),
                objective=ObjectiveConfig(kind=kind),
            )
        )
    except ConfigError as error:
        raise ModelError(f"config.json of model type {family.name!r} cannot be: {error}") from None
    return architecture
