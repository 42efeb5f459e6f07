"""The walk: scan equals unrolled, rematerialisation and caching change nothing, and no token sees what it must not."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cramjax.config import ModelConfig
from cramjax.errors import ConfigError
from cramjax.gpus import GPUS
from cramjax.kernels.heads import normalise_and_rotate
from cramjax.model import make_model
from cramjax.model.layers import Norm
from cramjax.model.positions import bigram_buckets, rotary_angles, sinusoids
from cramjax.model.stack import unrolls
from cramjax.parallel import batch_sharding, make_mesh, param_shardings
from cramjax.planning.targets import tracing_for

from .small import CAUSAL, CONFIGS, LENGTH, SEPARATOR, VOCAB, batch, build, trained_like


def _logits(model: Any, params: Any, tokens: jax.Array) -> jax.Array:
    return jax.jit(lambda p, t: model.logits(p, model.hidden(p, t)))(params, tokens)


def _gradients(model: Any, params: Any, tokens: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
        return jnp.sum(jnp.sin(model.hidden(params, tokens)))

    return jax.jit(jax.grad(loss))(params)


def _assert_close(left: Any, right: Any, atol: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4), left, right)


@pytest.mark.parametrize("name", CONFIGS)
def test_scan_equals_unrolled(name: str) -> None:
    scan, unrolled = build(name, layer_loop="scan"), build(name, layer_loop="unroll")
    params = trained_like(scan)
    _assert_close(_logits(scan, params, batch()), _logits(unrolled, params, batch()), atol=1e-5)
    # Float32 sums in another order; gradients here are sums of a few hundred terms near 1.
    _assert_close(_gradients(scan, params, batch()), _gradients(unrolled, params, batch()), atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_rematerialisation_changes_memory_only(layer_loop: str) -> None:
    config = dataclasses.replace(CONFIGS["modern"], layers=2, dropout=0.2)
    arguments = {"vocab_size": VOCAB, "sequence_length": LENGTH, "causal": True, "separator_id": SEPARATOR}
    kept = make_model(config, layer_loop=layer_loop, **arguments)
    recomputed = make_model(config, layer_loop=layer_loop, remat="full", **arguments)
    params = trained_like(kept)

    def compiled(model: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(jnp.sin(model.hidden(params, batch(), rng=jax.random.key(3))))

        return jax.jit(jax.grad(loss)).lower(params).compile()

    first, second = compiled(kept), compiled(recomputed)
    _assert_close(first(params), second(params), atol=5e-5)
    assert second.cost_analysis()["flops"] > 1.15 * first.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("layer_loop", "layers", "remat", "kernels", "unrolled"),
    [
        ("auto", 8, "none", False, True),
        ("auto", 9, "none", False, False),
        ("auto", 9, "none", True, True),
        ("auto", 32, "none", True, True),
        ("auto", 33, "none", True, False),
        ("auto", 2, "full", False, False),
        ("auto", 2, "full", True, False),
        ("scan", 2, "none", True, False),
        ("unroll", 99, "full", False, True),
    ],
)
def test_what_is_unrolled(layer_loop: Any, layers: int, remat: Any, kernels: bool, unrolled: bool) -> None:
    assert unrolls(layer_loop, layers, remat, kernels=kernels) is unrolled


def test_auto_unrolls_few_layers_only() -> None:
    few, many = (dataclasses.replace(CONFIGS["bare"], layers=layers) for layers in (8, 9))
    arguments = {"vocab_size": VOCAB, "sequence_length": LENGTH, "causal": True}
    assert make_model(few, **arguments).unroll
    assert not make_model(many, **arguments).unroll
    for card, unrolled in (("rtx-4090", True), ("rtx-2080-ti", False)):  # one has kernels for rows, the other not
        with tracing_for(GPUS[card]):
            assert make_model(few, **arguments).unroll
            assert make_model(many, **arguments).unroll == unrolled
            assert not make_model(many, **arguments, remat="full").unroll


@pytest.mark.parametrize("name", [name for name, causal in CAUSAL.items() if causal])
def test_changing_a_token_changes_no_earlier_logits(name: str) -> None:
    model = build(name)
    params = trained_like(model)
    at = 7
    changed = batch().at[:, at].set(VOCAB - 1)
    before, after = _logits(model, params, batch()), _logits(model, params, changed)
    assert (before[:, :at] == after[:, :at]).all()
    assert (before[:, at] != after[:, at]).any(axis=-1).all()


@pytest.mark.parametrize("name", ["crammed", "bert"])
def test_masked_models_see_both_ways(name: str) -> None:
    model = build(name)
    params = trained_like(model)
    changed = batch().at[:, 7].set(VOCAB - 1)
    assert (_logits(model, params, batch()) != _logits(model, params, changed)).any(axis=-1).all()


@pytest.mark.parametrize("causal", [True, False])
def test_documents_are_isolated_and_a_separator_opens_the_one_after_it(causal: bool) -> None:
    config = ModelConfig(layers=2, width=16, heads=2, mlp=16, mask_documents=True)
    model = make_model(config, vocab_size=VOCAB, sequence_length=LENGTH, causal=causal, separator_id=SEPARATOR)
    params = trained_like(model)
    tokens = batch()[:1]  # tokens 0-4 | separator at 5, tokens 6-11
    assert model.segment_ids(tokens)[0].tolist() == [0] * 5 + [1] * 7
    logits = _logits(model, params, tokens)
    other_first = _logits(model, params, tokens.at[0, 2].set(VOCAB - 1))
    assert (logits[0, 5:] == other_first[0, 5:]).all() and (logits[0, 2:5] != other_first[0, 2:5]).any()
    other_second = _logits(model, params, tokens.at[0, 8].set(VOCAB - 1))
    assert (logits[0, :5] == other_second[0, :5]).all()


def test_documents_mix_when_they_are_not_masked() -> None:
    config = ModelConfig(layers=1, width=16, heads=2, mlp=16)
    model = make_model(config, vocab_size=VOCAB, sequence_length=LENGTH, causal=True, separator_id=SEPARATOR)
    params = trained_like(model)
    changed = batch().at[0, 2].set(VOCAB - 1)
    assert (_logits(model, params, batch())[0, 8] != _logits(model, params, changed)[0, 8]).any()


def test_window_bounds_what_a_token_sees() -> None:
    config = ModelConfig(layers=2, width=16, heads=2, mlp=16, window=3)
    model = make_model(config, vocab_size=VOCAB, sequence_length=LENGTH, causal=True)
    params = trained_like(model)
    before, after = (_logits(model, params, t) for t in (batch(), batch().at[:, 2].set(VOCAB - 1)))
    reach = 2 * (3 - 1)  # layers × (window - 1)
    assert (before[:, 2 + reach + 1 :] == after[:, 2 + reach + 1 :]).all()
    assert (before[:, 2 + reach] != after[:, 2 + reach]).any()


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
@pytest.mark.parametrize("name", [name for name, causal in CAUSAL.items() if causal])
def test_cached_decoding_equals_the_whole_walk(name: str, layer_loop: str) -> None:
    model = build(name, layer_loop=layer_loop)
    params = trained_like(model)
    decode = jax.jit(model.decode)
    tokens, cache, outputs = batch(), model.init_cache(2, LENGTH + 3), []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, LENGTH)):
        hidden, cache = decode(params, cache, tokens[:, start:stop])
        outputs.append(hidden)
    whole = jax.jit(model.hidden)(params, tokens)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), whole, atol=2e-5)
    assert cache.length.tolist() == [LENGTH, LENGTH]


@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_rows_of_a_cache_may_differ_in_length(name: str) -> None:
    model = build(name)
    params = trained_like(model)
    decode = jax.jit(model.decode)
    tokens, cache = batch(), model.init_cache(2, LENGTH)
    _, cache = decode(params, cache, tokens[:, :8], jnp.array([8, 3]))
    following = jnp.stack([tokens[0, 8:11], tokens[1, 3:6]])
    hidden, cache = decode(params, cache, following, jnp.array([3, 2]))
    whole = jax.jit(model.hidden)(params, tokens)
    np.testing.assert_allclose(hidden[0], whole[0, 8:11], atol=2e-5)
    np.testing.assert_allclose(hidden[1, :2], whole[1, 3:5], atol=2e-5)
    assert cache.length.tolist() == [11, 5]


def test_a_cache_refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="Only causal models"):
        build("bert").init_cache(1, 8)
    with pytest.raises(ConfigError, match="20 learned positions.*got 21"):
        build("gpt2").init_cache(1, 21)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_of_the_vocabulary_gets_no_logits(name: str) -> None:
    model = build(name)
    logits = _logits(model, trained_like(model), batch())
    assert logits.shape == (2, LENGTH, VOCAB) and logits.dtype == jnp.float32
    table = model.abstract_params()["embed"]["token"]["table"]
    assert table.shape == (64, CONFIGS[name].width)


def test_dropout_acts_only_with_a_key_and_keeps_the_mean() -> None:
    config = ModelConfig(layers=1, width=64, heads=2, mlp=16, dropout=0.3, zero_init_outputs=True, final_norm=False)
    model = make_model(config, vocab_size=VOCAB, sequence_length=256, causal=True)
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 256), 0, VOCAB)
    hidden = jax.jit(model.hidden)
    still = hidden(params, tokens)
    dropped = hidden(params, tokens, rng=jax.random.key(2))
    share = float(jnp.mean(dropped == 0))
    assert abs(share - 0.3) < 0.01  # 131072 draws: five standard deviations are 0.006
    np.testing.assert_allclose(dropped[dropped != 0], (still / 0.7)[dropped != 0], rtol=1e-5)
    assert (hidden(params, tokens, rng=jax.random.key(2)) == dropped).all()
    assert (hidden(params, tokens, rng=jax.random.key(3)) != dropped).any()


@pytest.mark.slow
def test_zero_initialised_outputs_start_as_the_embedding() -> None:
    config = dataclasses.replace(CONFIGS["modern"], zero_init_outputs=True, final_norm=False)
    model = make_model(config, vocab_size=VOCAB, sequence_length=LENGTH, causal=True, separator_id=SEPARATOR)
    params = model.init(jax.random.key(0))
    x, _ = model.embed(params, batch())
    np.testing.assert_array_equal(model.hidden(params, batch()), x)


def test_initial_scales() -> None:
    config = ModelConfig(layers=8, width=128, heads=4, mlp=512, depth_scaled_init=True)
    arguments = {"vocab_size": 512, "sequence_length": 16, "causal": True}
    params = make_model(config, **arguments).init(jax.random.key(0))
    blocks = params["blocks"]
    for leaf, std in (
        (params["embed"]["token"]["table"], 0.02),
        (blocks["attention"]["qkv"]["kernel"], 0.02),
        (blocks["mlp"]["down"]["kernel"], 0.02 / 4),  # sqrt(2 · 8 layers)
    ):
        assert abs(float(jnp.std(leaf)) / std - 1) < 0.02
    assert not (blocks["mlp"]["up"]["kernel"][0] == blocks["mlp"]["up"]["kernel"][1]).any()
    params = make_model(dataclasses.replace(config, init_std=None), **arguments).init(jax.random.key(0))
    assert abs(float(jnp.std(params["embed"]["token"]["table"])) * 128**0.5 - 1) < 0.02
    assert abs(float(jnp.std(params["blocks"]["mlp"]["up"]["kernel"])) * 128**0.5 - 1) < 0.02


def test_embedding_skip_mixes_the_embedding_back() -> None:
    config = ModelConfig(layers=1, width=16, heads=2, mlp=16, embedding_skip=True, zero_init_outputs=True)
    model = make_model(config, vocab_size=VOCAB, sequence_length=LENGTH, causal=True)
    params = model.init(jax.random.key(0))
    params["blocks"]["skip"] = {"stream": jnp.array([0.5]), "embedding": jnp.array([2.0])}
    x, _ = model.embed(params, batch())
    np.testing.assert_allclose(model.stream(params, batch()), 2.5 * x, rtol=1e-6)


@pytest.mark.parametrize(("layers", "used"), [(3, [0, 2]), (4, [1, 3])])
def test_value_embeddings_enter_every_other_layer_counted_from_the_last(layers: int, used: list[int]) -> None:
    config = ModelConfig(layers=layers, width=16, heads=2, mlp=16, value_embeddings=True)
    model = make_model(config, vocab_size=VOCAB, sequence_length=LENGTH, causal=True)
    params = trained_like(model)
    assert params["embed"]["value"]["table"].shape == (2, 64, 16)
    gradients = _gradients(model, params, batch())
    assert np.flatnonzero(gradients["blocks"]["attention"]["value_gate"]).tolist() == used
    assert (jnp.abs(gradients["embed"]["value"]["table"]).sum(axis=(1, 2)) > 0).all()


def test_bigram_buckets_depend_on_both_tokens_and_none_comes_before_the_first() -> None:
    tokens = jnp.array([[3, 4, 5, 3, 4]], jnp.int32)
    buckets = bigram_buckets(tokens, None, 1000)[0].tolist()
    assert buckets[0] == 0 and buckets[1] == buckets[4] and len({*buckets}) == 4
    assert min(buckets[1:]) >= 1
    assert bigram_buckets(tokens[:, 1:], jnp.array([3], jnp.int32), 1000)[0].tolist() == buckets[1:]
    spread = bigram_buckets(jax.random.randint(jax.random.key(0), (4, 5000), 0, 4096), None, 64)
    assert {*np.unique(spread)} == {*range(64)}


def test_rotary_scores_depend_on_distance_only() -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(i: int, j: int) -> float:
        angles = [rotary_angles(jnp.array([[p]]), 16, 10_000.0) for p in (i, j)]
        at = [normalise_and_rotate(x, 1, own)[0] for x, own in zip((q, k), angles, strict=True)]
        return float(jnp.sum(at[0] * at[1]))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_sinusoids_are_those_of_the_transformer() -> None:
    table = sinusoids(50, 12)
    for position, column in ((0, 0), (7, 4), (49, 11)):
        angle = position / 10_000 ** (2 * (column // 2) / 12)
        expected = np.sin(angle) if column % 2 == 0 else np.cos(angle)
        assert table[position, column] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_are_computed_in_float32_as_defined(kind: str) -> None:
    x = np.random.default_rng(0).normal(2.0, 3.0, size=(3, 40))
    norm = Norm(40, ModelConfig(norm=kind, norm_eps=1e-5), nnx.Rngs(0))
    centred = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(jnp.float32(x)), expected, atol=1e-5)
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.slow
def test_bfloat16_follows_float32() -> None:
    model = build("modern", compute_dtype="bfloat16")
    params = trained_like(model)
    exact, rounded = _logits(build("modern"), params, batch()), _logits(model, params, batch())
    assert model.hidden(params, batch()).dtype == jnp.bfloat16 and rounded.dtype == jnp.float32
    # bfloat16 has 8 bits; errors of some dozen rounded operations, against logits capped at ±10.
    assert 0 < float(jnp.abs(exact - rounded).max()) < 0.5
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(_gradients(model, params, batch())))


@pytest.mark.parametrize("name", ["modern", "bert"])
def test_sharded_inputs_give_the_same_logits(name: str) -> None:
    model = build(name)
    params = trained_like(model)
    mesh = make_mesh(2, 4)
    tokens = jnp.tile(batch(), (4, 1))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, param_shardings(mesh, params, model.weights))
        logits = _logits(model, sharded, jax.device_put(tokens, batch_sharding(mesh)))
    np.testing.assert_allclose(logits, _logits(model, params, tokens), atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_documents": True}, "mask_documents needs a separator"),
        ({"positions": "learned", "max_positions": 4}, "at least the sequence length 12, got 4"),
    ],
)
def test_options_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_model(ModelConfig(**change), vocab_size=VOCAB, sequence_length=LENGTH, causal=True)


def test_cuts_past_the_vocabulary_cut_nothing() -> None:
    short, long = (
        make_model(
            ModelConfig(tied=False, adaptive_head=cuts), vocab_size=VOCAB, sequence_length=LENGTH, causal=True
        ).abstract_params()
        for cuts in ((20,), (20, VOCAB, 60))
    )
    assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)


def test_bigrams_are_for_causal_models() -> None:
    with pytest.raises(ConfigError, match="causal models only"):
        make_model(ModelConfig(bigram_buckets=8), vocab_size=VOCAB, sequence_length=LENGTH, causal=False)
