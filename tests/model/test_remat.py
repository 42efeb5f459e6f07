"""Rematerialisation: no policy changes a number, none recomputes what it says it keeps, and each needs less memory."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.kernels.attention import api, pallas
from cramjax.kernels.choice import Implementation, never
from cramjax.model import Model, layers, make_model
from cramjax.model.remat import remat_block

from .small import CAUSAL, CONFIGS, LENGTH, SEPARATOR, VOCAB, batch, trained_like

POLICIES = ("selective", "full", "offload")


def _model(name: str, remat: str, layer_loop: str, **changes: Any) -> Model:
    config = dataclasses.replace(CONFIGS[name], layers=2, **changes)
    return make_model(
        config, vocab_size=VOCAB, sequence_length=LENGTH, causal=CAUSAL[name], separator_id=SEPARATOR,
        layer_loop=layer_loop, remat=remat,
    )  # fmt: skip


def _loss(model: Model, params: Any) -> jax.Array:
    return jnp.sum(jnp.sin(model.hidden(params, batch(), rng=jax.random.key(3))))


def _value_and_gradients(model: Model) -> Any:
    return jax.jit(jax.value_and_grad(functools.partial(_loss, model)))(trained_like(model))


def _assert_same(model: Model, kept: Model) -> None:
    # Float32, recomputed in the same order, fused otherwise: some roundings of sums of a few hundred terms near 1.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
        _value_and_gradients(model),
        _value_and_gradients(kept),
    )


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
@pytest.mark.parametrize("name", ["modern", "bert"])
@pytest.mark.slow
def test_policies_change_no_gradient(name: str, layer_loop: str) -> None:
    kept = _model(name, "none", layer_loop, dropout=0.2)
    for remat in POLICIES:
        _assert_same(_model(name, remat, layer_loop, dropout=0.2), kept)


@pytest.mark.parametrize("remat", POLICIES)
def test_policies_change_no_gradient_of_a_small_model(remat: str) -> None:
    _assert_same(_model("gpt2", remat, "scan", dropout=0.2), _model("gpt2", "none", "scan", dropout=0.2))


@pytest.mark.parametrize("remat", POLICIES)
def test_policies_work_with_fused_attention(remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted = functools.partial(pallas.pallas, interpret=True)
    monkeypatch.setitem(api.IMPLEMENTATIONS, "pallas", Implementation("pallas", interpreted, never))
    _assert_same(_model("llama", remat, "scan"), _model("llama", "none", "scan"))


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _products(name: str, remat: str) -> int:
    model = _model(name, remat, "scan")
    program = jax.make_jaxpr(jax.grad(functools.partial(_loss, model)))(model.abstract_params())
    return sum(equation.primitive.name == "dot_general" for equation in _equations(program.jaxpr))


# A block multiplies with qkv, attention's two, out, up and down; the gradient of its own last product is not needed to
# differentiate it, unless a norm follows.
@pytest.mark.parametrize(("name", "full"), [("gpt2", 5), ("bert", 6)])
def test_no_product_that_is_kept_is_computed_again(name: str, full: int) -> None:
    attention = 2
    none = _products(name, "none")
    assert _products(name, "full") - none == full
    assert _products(name, "selective") - none == attention
    assert _products(name, "offload") - none == attention


def test_names_are_not_in_the_compiled_program(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("modern", "none", "unroll")

    def lowered() -> str:
        return jax.jit(jax.grad(lambda params: _loss(model, params))).lower(model.abstract_params()).as_text()

    named = lowered()
    monkeypatch.setattr(layers, "checkpoint_name", lambda x, name: x)
    assert lowered() == named


def test_each_policy_keeps_less() -> None:
    config = dataclasses.replace(CONFIGS["gpt2"], layers=12, width=32, heads=2, mlp=128, max_positions=None)
    tokens = jnp.zeros((16, 64), jnp.int32)

    def temporaries(remat: str) -> int:
        model = make_model(config, vocab_size=VOCAB, sequence_length=64, causal=True, remat=remat)  # pyright: ignore
        gradient = jax.grad(lambda params: jnp.sum(model.hidden(params, tokens)))
        memory = jax.jit(gradient).lower(model.abstract_params()).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    none, selective, full = map(temporaries, ("none", "selective", "full"))
    # float32, for each token of a layer: products of 3 × 32, 32 and 128, and in each policy the stream.
    assert selective - full == pytest.approx(12 * 16 * 64 * (96 + 32 + 128) * 4, rel=0.1)
    assert none > 1.5 * selective


def test_a_block_that_keeps_all_is_the_block_itself() -> None:
    model = _model("gpt2", "none", "scan")
    block = model.block
    assert remat_block(block, "none") is block
