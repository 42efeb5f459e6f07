"""Experts against a loop over them; what their router learns, counts and balances; and where they are."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cramjax.adapters import AdapterConfig
from cramjax.config import LayerConfig, ModelConfig, ObjectiveConfig, OptimConfig
from cramjax.errors import ConfigError, ModelError
from cramjax.experts import ExpertsConfig
from cramjax.kernels.packed import is_packed, pack, unpacked
from cramjax.model import count_parameters, make_model, objective_for, train_flops_per_token
from cramjax.model.adapters import adapted_weights
from cramjax.model.experts import LOAD_UNIT, Experts
from cramjax.model.layers import Context
from cramjax.model.loads import expert_loads
from cramjax.model.pattern import layer_configs, period_of
from cramjax.model.sizes import sizes_of
from cramjax.optim import When, make_fused, make_optimizer

VOCAB, LENGTH = 50, 12
CONFIG = ModelConfig(
    layers=4,
    width=16,
    heads=2,
    mlp=24,
    activation="swiglu",
    experts=ExpertsConfig(number=4, active=2, shared=1, every=2),
)
_KEY = jax.random.key(0)


def _layer(**changes: Any) -> tuple[Any, Any, Any]:
    """A layer's function `(parameters, x, context) -> y`, its parameters, with biases that matter, and x."""
    assert CONFIG.experts is not None
    config = replace(CONFIG, experts=replace(CONFIG.experts, **changes), init_std=0.5)
    layer = Experts(config, sizes_of(config, VOCAB, LENGTH), dtype="float32", rngs=nnx.Rngs(params=_KEY))
    graph, state = nnx.split(layer)
    params = nnx.to_pure_dict(state)
    params["router"]["bias"] = jnp.asarray([0.4, -0.3, 0.0, 0.2])
    x = jax.random.normal(_KEY, (3, 8, 16))
    return (lambda params, x, context: nnx.merge(graph, params)(x, context)), params, x


def _by_definition(params: Any, x: Any, config: ExpertsConfig, real: Any) -> tuple[Any, Any, Any]:
    """Every expert computes every token: the result, the router's loss summed over tokens, and loads."""
    rows = x.reshape(-1, 16)
    logits = rows @ params["router"]["kernel"]
    scores = jax.nn.softmax(logits) if config.scores == "softmax" else 1 / (1 + jnp.exp(-logits))
    order = jnp.argsort(-(scores + params["router"]["bias"]), axis=1)[:, : config.active]
    taken = sum(order[:, [i]] == jnp.arange(config.number) for i in range(config.active)).astype(jnp.float32)
    gates = taken * scores / (jnp.sum(taken * scores, 1, keepdims=True) if config.normalised else 1.0)

    def feed(up: Any, down: Any) -> Any:
        gate, value = jnp.split(rows @ up, 2, axis=1)
        return (gate / (1 + jnp.exp(-gate)) * value) @ down

    up, down, shared = params["up"]["kernel"], params["down"]["kernel"], params["shared"]
    y = sum(gates[:, [e]] * feed(up[e], down[e]) for e in range(config.number))
    y = y + feed(shared["up"]["kernel"], shared["down"]["kernel"])
    loads = jnp.sum(real[:, None] * taken, 0)
    z = jnp.sum(real * jnp.square(jnp.log(jnp.sum(jnp.exp(logits), 1))))
    mean = jnp.sum(real[:, None] * scores / jnp.sum(scores, 1, keepdims=True), 0) / jnp.sum(real)
    shares = jax.lax.stop_gradient(loads) / jnp.sum(loads)
    level = config.number * jnp.sum(shares * mean) * jnp.sum(real) if config.balance == "loss" else 0.0
    return y.reshape(x.shape), config.z_loss * z + config.balance_loss * level, loads


@pytest.mark.parametrize(
    "changes",
    [
        {"scores": "sigmoid", "balance": "bias", "z_loss": 0.3},
        pytest.param(
            {"scores": "softmax", "balance": "loss", "normalised": True, "balance_loss": 0.7}, marks=pytest.mark.slow
        ),
    ],
    ids=["sigmoid, by bias", "normalised softmax, by loss"],
)
def test_a_layer_is_a_loop_over_its_experts_in_values_and_gradients(changes: dict[str, Any]) -> None:
    layer, params, x = _layer(**changes)
    config = replace(CONFIG.experts, **changes)  # pyright: ignore
    mask = jnp.arange(8) < jnp.asarray([[8], [5], [7]])  # padding is computed, and counts for nothing
    real = mask.reshape(-1).astype(jnp.float32)
    by = jax.random.normal(jax.random.key(1), x.shape)

    def theirs(params: Any, x: Any) -> Any:
        y, loss, _ = _by_definition(params, x, config, real)
        return jnp.sum(y * by) + loss

    context = Context(kv_mask=mask)
    own = jax.jit(jax.grad(lambda params, x: jnp.sum(layer(params, x, context) * by), argnums=(0, 1)))(params, x)
    with jax.default_matmul_precision("highest"):
        y, _, loads = _by_definition(params, x, config, real)
        wanted = jax.jit(jax.grad(theirs, argnums=(0, 1)))(params, x)
    # float32's rounding of sums of at most 24 products, through two products and a gate.
    np.testing.assert_allclose(jax.jit(layer)(params, x, context), y, rtol=0, atol=2e-5)
    over = own[0]["router"].pop("bias") / LOAD_UNIT
    assert float(jnp.max(jnp.abs(wanted[0]["router"].pop("bias")))) == 0  # the bias has no part in what is computed
    np.testing.assert_allclose(over, loads - jnp.mean(loads), rtol=1e-6)
    for got, want in zip(jax.tree.leaves(own), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * float(jnp.abs(want).max()))


@pytest.mark.slow
def test_a_capacity_is_for_training_alone() -> None:
    layer, params, x = _layer(capacity=0.5)
    dropless, *_ = _layer()
    training = Context(rng=jax.random.key(2))
    np.testing.assert_array_equal(layer(params, x, Context()), dropless(params, x, Context()))
    own, whole = layer(params, x, training), dropless(params, x, training)
    changed = jnp.any(own != whole, axis=2).reshape(-1)
    # Six places an expert for 24 tokens' two choices: the first tokens have theirs, and many of the last have not.
    assert not changed[:3].any() and changed.sum() >= 8


def test_experts_are_where_the_period_says() -> None:
    assert [layer.experts for layer in layer_configs(CONFIG)] == [False, True, False, True]
    assert len(period_of(CONFIG)) == 2
    first_dense = replace(CONFIG, pattern=(LayerConfig(experts=False), *[LayerConfig()] * 3), experts=ExpertsConfig(4))
    assert [layer.experts for layer in layer_configs(first_dense)] == [False, True, True, True]
    assert not any(layer.experts for layer in layer_configs(replace(CONFIG, experts=None)))


def test_counts_and_flops_are_of_what_a_token_meets() -> None:
    counted = count_parameters(CONFIG, VOCAB, LENGTH)
    expert = 16 * 8 * 2 + 8 * 16  # a third of 24 wide, gated
    assert counted.experts == 2 * 4 * expert and counted.idle == counted.experts // 2
    assert counted.active == counted.total - counted.idle
    dense = replace(CONFIG, experts=None)
    router = 2 * (16 * 4 + 4)
    assert counted.active == count_parameters(dense, VOCAB, LENGTH).total + router
    flops = [train_flops_per_token(config, VOCAB, LENGTH, causal=True) for config in (CONFIG, dense)]
    assert flops[0] - flops[1] == 6 * 2 * 16 * 4


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(CONFIG, vocab_size=VOCAB, sequence_length=LENGTH, causal=True)


@pytest.fixture(scope="module")
def params(model: Any) -> Any:
    return jax.jit(model.init)(_KEY)


_TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, LENGTH))


@pytest.mark.slow
def test_decoding_gives_what_the_whole_text_gives(model: Any, params: Any) -> None:
    whole = jax.jit(model.hidden)(params, _TOKENS)
    step, cache = jax.jit(model.decode), model.init_cache(3, LENGTH)
    first, cache = step(params, cache, _TOKENS[:, :7])
    then, _ = step(params, cache, _TOKENS[:, 7:])
    np.testing.assert_allclose(jnp.concatenate([first, then], axis=1), whole, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_loads_are_counts_and_need_no_backward_pass(model: Any, params: Any) -> None:
    function = jax.jit(lambda params: expert_loads(model, params, jnp.asarray(_TOKENS)))
    loads = np.asarray(function(params))
    assert loads.shape == (2, 4)
    np.testing.assert_allclose(loads.mean(axis=1), 1.0, rtol=1e-6)
    counts = loads * _TOKENS.size * 2 / 4
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)
    pushed = jax.tree.map(jnp.copy, params)
    pushed["blocks"]["1"]["experts"]["router"]["bias"] += jnp.asarray([5.0, 0.0, 0.0, 5.0])
    np.testing.assert_allclose(function(pushed), [[2, 0, 0, 2]] * 2, atol=1e-6)
    # Forward products alone: a backward pass would have twice as many again.
    text = function.lower(params).compile().as_text()
    assert 0 < text.count("transpose(jvp") < text.count("jvp(") / 2
    with pytest.raises(ConfigError, match="The model has no experts"):
        expert_loads(replace(model, config=replace(CONFIG, experts=None)), params, jnp.asarray(_TOKENS))


def test_padding_takes_no_room_from_tokens() -> None:
    """Rows are as long as their texts or padded, before others: what tokens get is the same."""
    layer, params, _ = _layer(capacity=1.0)
    params["router"]["bias"] = jnp.asarray([9.0, 0.0, 0.0, 0.0])  # all go to one expert, and to a second one
    mask = jnp.arange(8) < jnp.asarray([[2], [3], [3]])
    x = jax.random.normal(_KEY, (3, 8, 16))
    context = Context(kv_mask=mask, rng=_KEY)
    own = jax.jit(layer)(params, x, context)[mask]
    # 8 tokens are real, of the 12 that the capacity of 24 tokens' choices among 4 experts gives one of them.
    np.testing.assert_allclose(own, jax.jit(layer)(params, x, Context(kv_mask=mask))[mask], rtol=0, atol=1e-5)


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("muon", "lion", "schedule_free_adamw")]


@pytest.mark.parametrize("name", ["adamw", *_SLOW])
def test_biases_move_by_their_rate_and_the_router_does_not_decay(name: str, model: Any, params: Any) -> None:
    config = OptimConfig(name=name, lr=0.5, weight_decay=0.1, schedule="constant", warmup=0.0, clip=1.0)
    weights, own = ({"router": tree["blocks"]["1"]["experts"]["router"]} for tree in (model.weights, params))
    optimizer = make_optimizer(config, weights)
    signs = np.asarray([[1, -1, 0, 0], [0, 2, -1, -1]], np.float32)
    grads = {"router": {"bias": LOAD_UNIT * signs, "kernel": jnp.zeros_like(own["router"]["kernel"])}}
    moved, _, measured = optimizer.update(grads, optimizer.init(own), own, 0.5)
    np.testing.assert_allclose(moved["router"]["bias"], -1e-3 * np.sign(signs), rtol=1e-6)
    np.testing.assert_allclose(moved["router"]["kernel"], own["router"]["kernel"], rtol=1e-6)  # averages round
    assert float(measured["grad_norm"]) < 1e-8  # loads are no part of a norm that clips


def test_adalomo_moves_biases_by_their_rate(model: Any) -> None:
    config = OptimConfig(name="adalomo", lr=0.5, schedule="constant", warmup=0.0)
    optimizer = make_fused(config, model.weights)
    place = [weight.role for weight in jax.tree.leaves(model.weights["blocks"])].index("balance")
    gradient, bias = LOAD_UNIT * jnp.asarray([3.0, -1.0, 0.0, -2.0]), jnp.zeros(4)
    when = When(jnp.int32(0), jnp.float32(0.5), 1.0, _KEY)
    moved, _ = optimizer.update("blocks", place, gradient, {"full": jnp.zeros(4)}, bias, when)
    np.testing.assert_allclose(moved, [-1e-3, 1e-3, 0.0, 1e-3], rtol=1e-6)


@pytest.mark.slow
def test_steps_level_the_loads_of_a_router_that_prefers_one_expert() -> None:
    experts = replace(CONFIG.experts, active=1, balance_rate=0.02)  # pyright: ignore
    config = replace(CONFIG, layers=2, experts=experts, init_std=0.3)
    own = make_model(config, vocab_size=VOCAB, sequence_length=LENGTH, causal=True)
    state = jax.jit(own.init)(_KEY)
    state["blocks"]["1"]["experts"]["router"]["bias"] += jnp.asarray([0.5, 0.0, 0.0, 0.0])
    objective = objective_for(ObjectiveConfig(), own)
    optimizer = make_optimizer(OptimConfig(lr=1e-4, schedule="constant", warmup=0.0), own.weights)
    rows = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (16, LENGTH + 1)))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda p: objective(p, rows, _KEY, 0.5, True).total)(params)
        return optimizer.update(optax.tree.scale(1 / rows.size, grads), state, params, 0.5)[:2]

    measure = jax.jit(lambda params: jnp.max(expert_loads(own, params, rows[:, :-1])))
    loads = [float(measure(state))]
    held = optimizer.init(state)
    for _ in range(60):
        state, held = step(state, held)
    loads.append(float(measure(state)))
    assert loads[0] > 3 and loads[1] < 1.25


@pytest.mark.slow
def test_packed_experts_give_what_their_codes_stand_for(model: Any, params: Any) -> None:
    packed = pack(params, model.weights, "int8", 8)
    matrix = packed["blocks"]["1"]["experts"]["up"]["kernel"]
    assert is_packed(matrix) and matrix.shape == (2, 4, 16, 16)
    assert not is_packed(packed["blocks"]["1"]["experts"]["router"]["kernel"])
    loose = jax.tree.map(unpacked, packed, is_leaf=is_packed)
    own, theirs = (jax.jit(model.hidden)(each, _TOKENS) for each in (packed, loose))
    np.testing.assert_allclose(own, theirs, rtol=0, atol=1e-4)


def test_adapters_are_not_for_the_matrices_of_experts(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"takes in blocks/1/experts/\w+/kernel, and the matrices of experts have no"):
        adapted_weights(model.weights, AdapterConfig(rank=2))
    adapted_weights(model.weights, AdapterConfig(rank=2, targets=("blocks/*attention/*",)))


def test_export_names_the_experts(model: Any, params: Any) -> None:
    from cramjax.formats.export import Exported, exact_class

    tokenizer: Any = SimpleNamespace(pad_id=None)
    with pytest.raises(ModelError, match=r"no class has .*model\.experts="):
        exact_class(Exported(model, params, tokenizer, "causal", LENGTH))
