"""Formulas against the arrays themselves, and against what XLA counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from cramjax.model import count_parameters, make_model, train_flops_per_token
from cramjax.model.counts import attended_pairs

from .small import CONFIGS, LENGTH, VOCAB, build


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_the_sizes_of_the_trees(name: str) -> None:
    params = build(name).abstract_params()
    count = count_parameters(CONFIGS[name], VOCAB, LENGTH)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(params[part])) for part in ("embed", "blocks", "head")]
    assert [count.embedding, count.blocks, count.head] == sizes
    assert count.total == sum(sizes)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
def test_attended_pairs_are_those_of_the_mask(causal: bool, window: int | None) -> None:
    length = 11
    pairs = sum(
        (not causal or j <= i) and (window is None or abs(i - j) < window) for i in range(length) for j in range(length)
    )
    assert attended_pairs(length, causal=causal, window=window) == pairs


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "crammed"])
def test_flops_are_what_xla_counts(name: str) -> None:
    # Wide and long enough for products to dominate; not causal, as XLA counts masked pairs too.
    config = dataclasses.replace(
        CONFIGS[name], width=256, heads=4, head_dim=64, mlp=512, max_positions=128, kv_heads=None
    )
    batch, length, vocab = 2, 128, 512
    model = make_model(config, vocab_size=vocab, sequence_length=length, causal=False, layer_loop="unroll")

    def step(params, tokens):
        def loss(params):
            return jnp.sum(jnp.square(model.logits(params, model.hidden(params, tokens))))

        return jax.grad(loss)(params)

    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    counted = jax.jit(step).lower(model.abstract_params(), tokens).compile().cost_analysis()["flops"]
    formula = batch * length * train_flops_per_token(config, vocab, length, causal=False)
    # XLA also counts norms, non-linearities and softmax: a few per cent at this size.
    assert formula < counted < 1.08 * formula


def test_the_head_counts_for_predicted_positions_only() -> None:
    config, vocab, length = CONFIGS["crammed"], 512, 128
    whole = train_flops_per_token(config, vocab, length, causal=False)
    masked = train_flops_per_token(config, vocab, length, causal=False, mask_rate=0.25)
    assert whole - masked == pytest.approx(6 * 0.75 * vocab * config.width)


def test_fused_matrices_are_split_as_they_are_used() -> None:
    for name, config in CONFIGS.items():
        blocks = build(name).weights["blocks"]
        head_dim = config.head_dim or config.width // config.heads
        keys = head_dim * (config.kv_heads or config.heads)
        assert blocks["attention"]["qkv"]["kernel"].widths == (head_dim * config.heads, keys, keys)
        gated = config.activation in ("geglu", "swiglu")
        assert blocks["mlp"]["up"]["kernel"].widths == ((config.mlp, config.mlp) if gated else ())
