"""Stacks whose blocks take turns: the same as the blocks by hand, however the stack is walked."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import LayerConfig, ModelConfig, RopeScaling
from cramjax.errors import ConfigError
from cramjax.model import Model, make_model, train_flops_per_token
from cramjax.model.pattern import period_of, repeats_of, rotaries_of
from cramjax.planning import estimate_memory
from cramjax.planning.plan import under
from cramjax.recipes import from_yaml, load_recipe, to_yaml

from .small import LENGTH, SEPARATOR, VOCAB, batch, trained_like

_LOCAL, _GLOBAL, _BARE = LayerConfig(window=3), LayerConfig(rope_base=1e5), LayerConfig(rotary=False)
_PATTERN = (_LOCAL, dataclasses.replace(_GLOBAL, attention_norm=False), _BARE)
_CONFIG = ModelConfig(layers=6, width=24, heads=4, kv_heads=2, mlp=32, norm="rmsnorm", pattern=_PATTERN)


def _made(config: ModelConfig, **options: Any) -> Model:
    arguments = {"vocab_size": VOCAB, "sequence_length": LENGTH, "causal": True, "separator_id": SEPARATOR}
    return make_model(config, **arguments | options)


def _layers(model: Model, params: Any) -> list[Any]:
    """The parameters of every block, in order."""
    places = [str(place) for place in range(len(model.period))]
    stacked = params["blocks"] if len(places) > 1 else {"0": params["blocks"]}
    return [
        jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], stacked[place])
        for repeat in range(model.repeats)
        for place in places
    ]


def test_the_period_is_the_smallest_that_the_stack_repeats() -> None:
    def shape(layers: int, *pattern: LayerConfig) -> tuple[int, int]:
        config = ModelConfig(layers=layers, pattern=pattern)
        return len(period_of(config)), repeats_of(config)

    assert shape(6) == (1, 6)
    assert shape(6, _LOCAL, _GLOBAL) == (2, 3)
    assert shape(5, _LOCAL, _GLOBAL) == (5, 1)  # ends within a pattern
    assert shape(8, _LOCAL, _GLOBAL, _LOCAL, _GLOBAL) == (2, 4)
    # Blocks that compute the same are the same: the base that the model has anyway, a scaling that it has not.
    assert shape(4, LayerConfig(), LayerConfig(rope_base=10_000.0), LayerConfig(rope_scaled=False)) == (1, 4)
    scaled = ModelConfig(
        rope_scaling=RopeScaling("linear", 2.0), pattern=(LayerConfig(), LayerConfig(rope_scaled=False))
    )
    assert rotaries_of(scaled) == ((10_000.0, True), (10_000.0, False))


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_a_stack_is_its_blocks_in_turn(layer_loop: str) -> None:
    model = _made(_CONFIG, layer_loop=layer_loop)
    assert (len(model.period), model.repeats) == (3, 2)
    params, tokens = trained_like(model), batch()

    def by_hand(params: Any) -> jax.Array:
        x, _ = model.embed(params, tokens)
        for layer, own in enumerate(_layers(model, params)):
            kind = _PATTERN[layer % 3]
            alone = _made(
                dataclasses.replace(
                    _CONFIG,
                    layers=1,
                    pattern=() if kind.attention_norm else (kind,),
                    window=kind.window if kind.attention_norm else None,
                    positions="rotary" if kind.rotary else "none",
                    rope_base=kind.rope_base or 10_000.0,
                )
            )
            x = alone.block(own, x, alone.embed(params, tokens)[1], 0)
        return model.head(params, x)

    def both(walk: Any) -> Any:
        loss = lambda params: (jnp.sum(jnp.sin(out := walk(params))), out)  # noqa: E731
        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (gradients, hidden), (wanted, expected) = both(lambda p: model.hidden(p, tokens)), both(by_hand)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    # Float32 sums in another order; gradients here are sums of a few hundred terms near 1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), gradients, wanted)

    decode, cache, parts = jax.jit(model.decode), model.init_cache(2, LENGTH), []
    for start, stop in ((0, 7), (7, 8), (8, LENGTH)):
        part, cache = decode(params, cache, tokens[:, start:stop])
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_keep_their_numbers(remat: Any) -> None:
    """Blocks that compute alike, told apart by a window past the sequence: dropout, value embeddings, random keys."""
    plain = ModelConfig(layers=4, width=16, heads=2, mlp=16, dropout=0.3, value_embeddings=True, embedding_skip=True)
    pattern = (LayerConfig(), LayerConfig(window=10 * LENGTH))
    one, two = _made(plain), _made(dataclasses.replace(plain, pattern=pattern), layer_loop="scan", remat=remat)
    assert (one.repeats, two.repeats) == (4, 2)
    params, paired = (jax.jit(model.init)(jax.random.key(3)) for model in (one, two))
    for own, other in zip(_layers(one, params), _layers(two, paired), strict=True):
        jax.tree.map(np.testing.assert_array_equal, own, other)
    second = jax.jit(two.init_block)(jax.random.key(3), 1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[1]), second, paired["blocks"])
    hidden, same = (
        jax.jit(lambda p, model=model: model.hidden(p, batch(), rng=jax.random.key(1)))(own)
        for model, own in ((one, params), (two, paired))
    )
    np.testing.assert_allclose(hidden, same, atol=1e-5)


def test_flops_count_each_blocks_window() -> None:
    def flops(**options: Any) -> float:
        config = dataclasses.replace(_CONFIG, pattern=(), **options)
        return train_flops_per_token(config, VOCAB, 64, causal=True)

    mixed = train_flops_per_token(_CONFIG, VOCAB, 64, causal=True)
    assert mixed == pytest.approx((flops(window=3) + 2 * flops()) / 3)


def test_a_pattern_is_written_and_read() -> None:
    pattern = [{"window": 64}, {"rope_base": 1e6, "rotary": True}]
    config = load_recipe("quickstart", {"model.pattern": pattern})
    assert config.model.pattern == (LayerConfig(window=64), LayerConfig(rope_base=1e6))
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.window": 8, "model.pattern": [{}]}, "leave model.window out"),
        ({"model.norm_position": "post", "model.pattern": [{"attention_norm": False}]}, "attention_norm=true"),
        ({"model.positions": "learned", "model.pattern": [{"rope_base": 1e6}]}, "gives a rope_base"),
        ({"model.pattern": [{"window": 0}]}, r"model.pattern\[0\].window must be at least 1, got 0"),
        ({"model.pattern": [{"widow": 8}]}, "a list of mappings of window, rope_base"),
    ],
)
def test_patterns_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("quickstart", options)


def test_plans_keep_the_stream_of_each_repeat() -> None:
    pattern = [{"window": 256}, {"window": 256}, {}]

    def activations(**options: Any) -> int:
        config = under(load_recipe("gpt-124m", options), "full")
        return estimate_memory(config, vocab_size=50304, compute_dtype="bfloat16", gpu=None).by_kind["activations"]

    config = load_recipe("gpt-124m", {"model.pattern": pattern})
    stream = config.batch.microbatch * config.data.sequence_length * config.model.width * 2
    assert repeats_of(config.model) == config.model.layers // 3
    saved = activations() - activations(**{"model.pattern": pattern})
    assert saved >= (config.model.layers - repeats_of(config.model)) * stream
