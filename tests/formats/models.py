"""Tiny random models of `transformers`, one of each family and of each option that changes what is computed."""

from typing import Any

import numpy as np

VOCAB, LENGTH = 130, 24
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, **TOKENS}
GROUPED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
FOUR = {**GROUPED, "num_hidden_layers": 4}
GEMMA = {**FOUR, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7}

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
_SLIDING = ["sliding_attention", "full_attention"]

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2", "LMHeadModel", {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 48, "n_layer": 3, "n_head": 4}),
    "llama": ("Llama", "ForCausalLM", {**GROUPED, "rms_norm_eps": 1e-5}),
    "llama-biases-tied": (
        "Llama",
        "ForCausalLM",
        {**GROUPED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 8},
    ),
    "llama-llama3": (
        "Llama",
        "ForCausalLM",
        {**GROUPED, "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 16}},
    ),
    "llama-yarn": (
        "Llama",
        "ForCausalLM",
        {**GROUPED, "rope_parameters": {**_YARN, "original_max_position_embeddings": 16}},
    ),
    "llama-linear": (
        "Llama",
        "ForCausalLM",
        {**GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": ("Mistral", "ForCausalLM", {**GROUPED, "sliding_window": 7}),
    "qwen2": ("Qwen2", "ForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        "ForCausalLM",
        {**FOUR, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", "ForCausalLM", {**GROUPED, "head_dim": 16}),
    "smollm3": ("SmolLM3", "ForCausalLM", FOUR),
    "gemma2": ("Gemma2", "ForCausalLM", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", "ForCausalLM", {**GEMMA, "layer_types": [*_SLIDING, *_SLIDING]}),
    "nanochat-yarn": (
        "NanoChat",
        "ForCausalLM",
        {**GROUPED, "rope_parameters": {**_YARN, "original_max_position_embeddings": 16}},
    ),
    "nanochat": ("NanoChat", "ForCausalLM", {**GROUPED, "final_logit_softcapping": 2.0}),
    "bert": ("Bert", "ForMaskedLM", {**SMALL, "intermediate_size": 96, "max_position_embeddings": 32}),
    "bert-untied": (
        "Bert",
        "ForMaskedLM",
        {**SMALL, "intermediate_size": 96, "max_position_embeddings": 32, "tie_word_embeddings": False},
    ),
    "roberta": (
        "Roberta",
        "ForMaskedLM",
        {**SMALL, "bos_token_id": 0, "pad_token_id": 1, "intermediate_size": 96, "max_position_embeddings": 34},
    ),
    "modernbert": (
        "ModernBert",
        "ForMaskedLM",
        {
            **{**SMALL, "num_hidden_layers": 6},
            **{"intermediate_size": 64, "local_attention": 10, "max_position_embeddings": 64},
            **{"cls_token_id": 1, "sep_token_id": 2, "norm_bias": True, "classifier_bias": True},
        },
    ),
}
EXPERTS: dict[str, Any] = {**GROUPED, "num_experts_per_tok": 2, "initializer_range": 0.1}
QWEN_EXPERTS = {**EXPERTS, "num_experts": 5, "moe_intermediate_size": 32}
MODELS |= {
    "mixtral": ("Mixtral", "ForCausalLM", {**EXPERTS, "num_local_experts": 4, "sliding_window": 7}),
    "qwen2-experts": (
        "Qwen2Moe",
        "ForCausalLM",
        {**QWEN_EXPERTS, "shared_expert_intermediate_size": 96, "decoder_sparse_step": 3},
    ),
    "qwen3-experts": (
        "Qwen3Moe",
        "ForCausalLM",
        {**QWEN_EXPERTS, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
}
PATTERNED = ("qwen2-window", "smollm3", "gemma2", "gemma3", "modernbert")


def theirs(kind: str) -> Any:
    """A model whose weights are all random: biases, norms and padding rows too."""
    import torch
    import transformers

    name, head, options = MODELS[kind]
    config = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    options = {**TOKENS, **options} if kind == "gpt2" else options
    model = getattr(transformers, name + head)(getattr(transformers, config)(**options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def seeded(kind: str) -> Any:
    """The same model every time: what its class draws too."""
    import torch

    torch.manual_seed(0)
    return theirs(kind)


def arrays(named: Any) -> dict[str, np.ndarray]:
    """Tensors by name as arrays."""
    return {name: tensor.detach().numpy() for name, tensor in named}


def tokens() -> np.ndarray:
    """Never the padding token, which gets no gradient in torch, and stands for no position in RoBERTa."""
    return np.random.default_rng(0).integers(3, VOCAB, (2, LENGTH))
