"""Plans of models of experts: both counts are shown, and bytes are near the compiler's."""

from dataclasses import replace

import pytest

from cramjax.experts import ExpertsConfig
from cramjax.gpus import GPUS
from cramjax.planning import compile_here, compile_step, estimate_memory, missing, plan
from cramjax.planning.show import page, sentences
from cramjax.recipes import load_recipe

needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


def test_a_plan_shows_all_parameters_and_active_ones() -> None:
    made = plan("moe-1b", "h100", policies=["full"])
    shown = made.json()
    assert 1.1e9 < shown["parameters"] < 1.3e9 and 2.4e8 < shown["active_parameters"] < 2.6e8
    text = f"{page(made)} {' '.join(sentences(made))}"
    assert "20 tokens an active parameter" in text
    tokens = made.purchase.tokens
    assert made.purchase.chinchilla == pytest.approx(tokens / 20 / shown["active_parameters"])
    dense = plan("gpt-1.3b", "h100", policies=["full"]).json()
    assert dense["parameters"] == dense["active_parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_estimates_are_within_a_tenth_of_the_cpus_own_program(dtype: str, remat: str) -> None:
    config = load_recipe("moe-mini", {"train.compute_dtype": dtype, "train.data_parallel": 1, "train.remat": remat})
    if remat == "none" and dtype == "float32":  # others than the recipe's, in every third block
        experts = ExpertsConfig(4, active=2, shared=1, width=256, every=3)
        config = replace(config, model=replace(config.model, activation="swiglu", experts=experts))
    vocab = config.tokenizer.vocab_size
    estimate = estimate_memory(config, vocab_size=vocab, compute_dtype=dtype, gpu=None)
    assert estimate.device_bytes == pytest.approx(compile_here(config).device_bytes, rel=0.1)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_estimates_are_within_a_tenth_of_the_compilers_bytes(remat: str) -> None:
    config = load_recipe("moe-1b", {"train.data_parallel": 1, "train.remat": remat})
    vocab = config.tokenizer.vocab_size
    estimate = estimate_memory(config, vocab_size=vocab, compute_dtype="bfloat16", gpu=GPUS["h100"])
    assert estimate.device_bytes == pytest.approx(compile_step(config, "h100").device_bytes, rel=0.1)
