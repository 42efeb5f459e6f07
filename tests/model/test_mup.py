"""µP: the standard parametrisation exactly at the base width, and table 8 of Yang et al. 2022 at others."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import ModelConfig, OptimConfig
from cramjax.model import make_model, width_ratio
from cramjax.optim import make_optimizer
from cramjax.optim.groups import peak_rate, weight_decay
from tests.model.small import CAUSAL, CONFIGS, LENGTH, SEPARATOR, VOCAB, batch, build, trained_like
from tests.optim.trees import ROLE, declared, flatten, nest, random_flat

WIDE = ModelConfig(layers=1, width=256, heads=4, mlp=512, tied=False, mup_base_width=64, mup_base_head_dim=16)
RATIO = 4.0


def made(config: ModelConfig, **options: Any):
    return make_model(config, vocab_size=VOCAB, sequence_length=LENGTH, causal=True, **options)


@pytest.mark.parametrize("init_std", [None, 0.02])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "adaptive"])
def test_at_the_base_width_it_is_the_standard_parametrisation(name: str, init_std: float | None):
    standard = dataclasses.replace(CONFIGS[name], init_std=init_std)
    head_dim = standard.head_dim or standard.width // standard.heads
    mup = dataclasses.replace(standard, mup_base_width=standard.width, mup_base_head_dim=head_dim)
    options = {"vocab_size": VOCAB, "sequence_length": LENGTH, "causal": CAUSAL[name], "separator_id": SEPARATOR}
    models = [make_model(config, **options) for config in (standard, mup)]
    first, second = (model.init(jax.random.key(0)) for model in models)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    if init_std is not None:  # which matters at the start alone
        return
    one, other = (jax.jit(lambda p, m=m: m.logits(p, m.hidden(p, batch())))(trained_like(m)) for m in models)
    np.testing.assert_array_equal(one, other)


def test_initial_scales():
    model = made(dataclasses.replace(WIDE, init_std=0.1))
    params = flatten(model.init(jax.random.key(0)))
    for path, std in {  # what is hidden has a variance ∝ 1 / fan_in, and the rest that of the base width
        "embed/token/table": 0.1,
        "head/decoder/kernel": 0.1,
        "blocks/attention/qkv/kernel": 0.1 / RATIO**0.5,
        "blocks/mlp/down/kernel": 0.1 / RATIO**0.5,
    }.items():
        assert float(jnp.std(params[path])) == pytest.approx(std, rel=0.03), path
    params = flatten(made(dataclasses.replace(WIDE, init_std=None)).init(jax.random.key(0)))
    for path, std in {
        "embed/token/table": 64**-0.5,
        "head/decoder/kernel": 64**-0.5,
        "blocks/attention/qkv/kernel": 256**-0.5,
        "blocks/mlp/down/kernel": 512**-0.5,
    }.items():
        assert float(jnp.std(params[path])) == pytest.approx(std, rel=0.03), path


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_divided_by_the_width_ratio_and_the_bias_is_not(tied: bool):
    config = dataclasses.replace(WIDE, tied=tied, head_bias=True, mup_base_head_dim=None)
    mup, standard = made(config), made(dataclasses.replace(config, mup_base_width=None))
    params = trained_like(standard)
    bias = params["head"]["decoder"]["bias"][:VOCAB]

    def logits(model: Any) -> Any:
        return model.logits(params, model.hidden(params, batch())) - bias

    np.testing.assert_allclose(RATIO * logits(mup), logits(standard), rtol=1e-4, atol=1e-4)  # float32 sums


def test_attention_scores_shrink_with_the_head_beyond_its_base():
    # Heads are 64 wide, 4 times their base of 16: scores are divided by 64 · sqrt(16) / 16, not by sqrt(64).
    assert made(WIDE).sizes.attention_scale == pytest.approx(16**0.5 / 64)
    mup = made(dataclasses.replace(WIDE, positions="none"))
    standard = made(dataclasses.replace(WIDE, positions="none", mup_base_width=None, mup_base_head_dim=None))
    params = trained_like(standard)
    scaled = jax.tree.map(lambda x: x, params)
    queries = mup.sizes.qkv[0]
    kernel = params["blocks"]["attention"]["qkv"]["kernel"]
    scaled["blocks"]["attention"]["qkv"]["kernel"] = kernel.at[..., :queries].multiply((16 / 64) ** 0.5)
    np.testing.assert_allclose(mup.stream(params, batch()), standard.stream(scaled, batch()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "schedule_free_adamw", "adan", "lion"])
def test_rates_and_decay_by_role(name: Any):
    config = OptimConfig(name=name, lr=0.01, embed_lr=0.3, weight_decay=0.1)
    for role, rate in (("embedding", 0.3), ("head", 0.01), ("scalar", 0.01), ("matrix", 0.01 / RATIO)):
        assert peak_rate(config, role, RATIO) == pytest.approx(rate)
        decayed = 0.0 if role == "scalar" else 0.1 * {"embedding": 0.3}.get(role, 0.01)
        assert peak_rate(config, role, RATIO) * weight_decay(config, role, RATIO) == pytest.approx(decayed)


def test_muon_keeps_its_rate_and_its_update_has_a_spectral_norm_that_width_does_not_change():
    config = OptimConfig(name="muon", lr=0.02, weight_decay=0.1, schedule="constant", clip=None)
    assert peak_rate(config, "matrix", RATIO) == 0.02
    assert weight_decay(config, "matrix", RATIO) == 0.1
    norms = []
    for width in (32, 128):
        kernel = np.random.default_rng(0).standard_normal((1, width, 4 * width)).astype(np.float32)
        zero = nest({"blocks/mlp/up/kernel": np.zeros_like(kernel)})
        optimizer = make_optimizer(config, declared(zero), width_ratio=width / 32)
        moved, _, metrics = optimizer.update(
            nest({"blocks/mlp/up/kernel": kernel}), optimizer.init(zero), zero, jnp.array(0.5)
        )
        norms.append(np.linalg.norm(moved["blocks"]["mlp"]["up"]["kernel"][0], 2) / 0.02)
        assert float(metrics["lr"]) == pytest.approx(0.02)
    assert norms == pytest.approx([2.0, 2.0], rel=0.25)  # sqrt(4), to what 5 iterations leave


@pytest.mark.slow
def test_a_step_of_adamw_against_its_definition():
    config = OptimConfig(lr=0.01, weight_decay=0.1, schedule="constant", clip=None, eps=1e-12)
    start, gradient = random_flat(0), random_flat(1)
    params = nest(start)
    optimizer = make_optimizer(config, declared(params), width_ratio=RATIO)
    moved, _, metrics = optimizer.update(nest(gradient), optimizer.init(params), params, jnp.array(0.5))
    assert float(metrics["lr"]) == pytest.approx(0.01 / RATIO)
    for path, after in flatten(moved).items():  # the first step of Adam is the sign; decay · rate is 0.1 · 0.01
        rate = 0.01 / (RATIO if ROLE[path] == "matrix" else 1)
        shrunk = start[path] * (1 - (ROLE[path] != "scalar") * 0.1 * 0.01)
        np.testing.assert_allclose(after, shrunk - rate * np.sign(gradient[path]), rtol=2e-5, atol=2e-6)


def test_width_ratio():
    assert width_ratio(WIDE) == RATIO
    assert width_ratio(ModelConfig(width=96)) == 1.0


@pytest.mark.parametrize("remat", ["none", "full"])
def test_decoding_with_a_cache_sees_the_same_model(remat: Any):
    config = dataclasses.replace(CONFIGS["gpt2"], mup_base_width=8, mup_base_head_dim=4)
    model = made(config, separator_id=SEPARATOR, remat=remat)
    params, tokens = trained_like(model), batch()
    whole = model.logits(params, model.hidden(params, tokens))
    hidden, _ = model.decode(params, model.init_cache(2, LENGTH), tokens)
    np.testing.assert_allclose(model.logits(params, hidden), whole, rtol=1e-4, atol=1e-4)
    assert not np.allclose(whole, build("gpt2").logits(params, build("gpt2").hidden(params, tokens)), rtol=0.1)
