"""Models whose matrices have adapters: what they compute, decode and give gradients to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.kernels.packed import LowRank, is_packed, low_rank, pack, unpacked
from cramjax.model import Model

from . import small


def adapted(model: Model, params: Any) -> Any:
    """Parameters of which every matrix and head has an adapter that changes it; bases may be packed."""
    keys = iter(jax.random.split(jax.random.key(5), 200))

    def wrap(weight: Any, leaf: Any) -> Any:
        if weight.role not in ("matrix", "head"):
            return leaf
        started = low_rank(leaf, 2, scale=0.5, key=next(keys), widths=weight.widths, dora=len(weight.widths) != 2)
        drawn = 0.2 * jax.random.normal(next(keys), started.b.shape)
        return LowRank(leaf, started.a, drawn, started.magnitude, started.scale, started.widths)

    return jax.tree.map(wrap, model.weights, params)


def plain(params: Any) -> Any:
    return jax.tree.map(unpacked, params, is_leaf=is_packed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "walk"),
    [("modern", "scan"), ("modern", "unroll"), ("llama", "scan"), ("llama", "unroll"), ("bert", "unroll")],
)
def test_a_model_with_adapters_computes_what_the_sums_do(name: str, walk: Any) -> None:
    model = small.build(name, layer_loop=walk)
    params = adapted(model, pack(small.trained_like(model), model.weights, "int8", 8))
    tokens = small.batch()

    @jax.jit
    def run(params: Any) -> Any:
        hidden = model.hidden(params, tokens)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return model.logits(params, hidden), model.loss_sums(params, rows, tokens.reshape(-1)).total

    for got, wanted in zip(run(params), run(plain(params)), strict=True):
        # The same products, summed apart.
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("walk", ["scan", "unroll"])
def test_gradients_go_to_what_is_trained(walk: Any) -> None:
    model = small.build("llama", layer_loop=walk)
    params = adapted(model, small.trained_like(model))
    tokens = small.batch()

    def loss(params: Any) -> jax.Array:
        rows = model.hidden(params, tokens).reshape(-1, 24)
        return model.loss_sums(params, rows, tokens.reshape(-1)).total

    gradients = jax.jit(jax.grad(loss))(params)
    of_sums = jax.jit(jax.grad(lambda params: loss(plain(params))))(params)
    for leaf, other in zip(*(jax.tree.leaves(tree, is_leaf=is_packed) for tree in (gradients, of_sums)), strict=True):
        if not isinstance(leaf, LowRank):
            continue
        assert not leaf.base.any()
        for part in leaf.trained:
            got, wanted = getattr(leaf, part), getattr(other, part)
            if wanted is None:
                continue
            # Through the products, and through the sum of base and adapter.
            assert wanted.any()
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * float(jnp.abs(wanted).max()))


@pytest.mark.slow
@pytest.mark.parametrize("walk", ["scan", "unroll"])
def test_text_is_continued_as_with_the_sums(walk: Any) -> None:
    model = small.build("llama", layer_loop=walk)
    params = adapted(model, pack(small.trained_like(model), model.weights, "nf4", 8))
    tokens = small.batch()

    @jax.jit
    def continued(params: Any) -> jax.Array:
        _, cache = model.decode(params, model.init_cache(2, 12), tokens[:, :7])
        return model.logits(params, model.decode(params, cache, tokens[:, 7:])[0])

    np.testing.assert_allclose(continued(params), continued(plain(params)), rtol=2e-4, atol=1e-4)
