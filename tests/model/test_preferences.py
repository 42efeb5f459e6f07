"""Direct preference optimisation: loss and gradient against the definition in float64, however a batch is cut."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.adapters import AdapterConfig
from cramjax.config import ModelConfig, ObjectiveConfig
from cramjax.kernels.packed import without_adapters
from cramjax.model import Model, make_model, objective_for
from cramjax.model.preferences import preference_loss

VOCAB, LENGTH, BETA = 20, 23, 0.3
PAIRS = [((3, 4), (5, 6), (7,)), ((8,), (9, 10, 11), (12, 13)), ((1, 2, 3), (4,), (5, 6)), ((), (1, 17), (18, 2))]
"""Prompt, chosen and rejected, of which the answers are predicted; of an empty prompt, all but the first."""


@pytest.fixture(scope="module")
def made() -> tuple[Model, dict]:
    config = ModelConfig(layers=1, width=16, heads=2, mlp=32, vocab_multiple=1, init_std=0.3)
    options = {"vocab_size": VOCAB, "sequence_length": LENGTH, "causal": True, "compute_dtype": "float32"}
    model = make_model(config, **options, adapter=AdapterConfig(rank=2))  # pyright: ignore[reportArgumentType]
    params = model.init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return model, jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)


def row(pairs: list, length: int = LENGTH) -> np.ndarray:
    """Pairs as a row holds them."""
    made, at, number = np.zeros((3, length + 1), np.int32), 0, 0
    for prompt, *answers in pairs:
        for answer in answers:
            ids, number = [*prompt, *answer], number + 1
            to = at + len(ids)
            made[0, at:to], made[1, at:to], made[2, at + len(prompt) : to], at = ids, number, 1, to
    return made


def logs(model: Model, params: dict, prompt: tuple, answer: tuple) -> float:
    """The log-probability of an answer alone, summed in float64."""
    ids = jnp.asarray([[*prompt, *answer]], jnp.int32)
    logits = np.asarray(model.logits(params, model.hidden(params, ids))[0], np.float64)
    logits = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    first = max(len(prompt), 1)
    return sum(logits[place - 1, int(ids[0, place])] for place in range(first, ids.shape[1]))


@pytest.mark.slow
def test_the_loss_is_that_of_the_definition_and_microbatches_add_up(made: tuple[Model, dict]) -> None:
    model, params = made
    objective = objective_for(ObjectiveConfig(kind="preference", beta=BETA), model)
    bare = without_adapters(params)
    margins = []
    for prompt, chosen, rejected in PAIRS:
        gains = [logs(model, params, prompt, a) - logs(model, bare, prompt, a) for a in (chosen, rejected)]
        margins.append(BETA * (gains[0] - gains[1]))
    wanted = sum(np.log1p(np.exp(-np.float64(margin))) for margin in margins)

    def total(params: dict, rows: np.ndarray) -> tuple:
        loss = objective(params, jnp.asarray(rows), None, 0.5, True)
        return loss.total, loss

    grad = jax.jit(jax.value_and_grad(total, has_aux=True))
    # However pairs lie in rows, and rows in microbatches of ragged lengths, padding among them.
    whole = [row(PAIRS[:2]), row(PAIRS[2:])]
    cut = [row(PAIRS[1:2]), row([PAIRS[0], PAIRS[3]]), row(PAIRS[2:3]), row([])]
    found = []
    for batches in ([whole], [cut[:2], cut[2:]]):
        each = [grad(params, np.stack(batch)) for batch in batches]
        assert sum(float(loss.tokens) for (_, loss), _ in each) == len(PAIRS)
        assert sum(float(loss.correct) for (_, loss), _ in each) == sum(margin > 0 for margin in margins)
        np.testing.assert_allclose(sum(float(value) for (value, _), _ in each), wanted, rtol=1e-5)
        found.append(jax.tree.map(lambda *parts: sum(parts), *(by for _, by in each)))
    one, two = map(jax.tree.leaves, found)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    # Its gradient is the difference quotient, along a direction in which only the adapter moves.
    leaf = params["blocks"]["mlp"]["up"]["kernel"]
    along = jax.random.normal(jax.random.key(3), leaf.a.shape)

    def moved(step: float) -> float:
        own = jax.tree.map(lambda x: x, params)
        own["blocks"]["mlp"]["up"]["kernel"] = replace(leaf, a=leaf.a + step * along)
        return float(grad(own, np.stack(whole))[0][0])

    slope = float(jnp.vdot(found[0]["blocks"]["mlp"]["up"]["kernel"].a, along))
    np.testing.assert_allclose((moved(1e-2) - moved(-1e-2)) / 2e-2, slope, rtol=2e-2, atol=2e-4)


def test_closed_forms() -> None:
    """Where nothing has been learned, a pair costs ln 2, with slopes ∓β / 2; one that is not there, nothing."""
    own, there = jnp.asarray([[-3.0, -4.0, -5.0, -1.0]]), jnp.asarray([[True, False]])
    value, slopes = jax.value_and_grad(lambda x: preference_loss(x, own, there, BETA).total)(own)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(slopes, [[-BETA / 2, BETA / 2, 0, 0]], rtol=1e-6)
    learned = preference_loss(own + jnp.asarray([[2.0, -1.0, 0, 0]]), own, there, BETA)
    np.testing.assert_allclose(learned.total, np.log1p(np.exp(-3 * BETA)), rtol=1e-6)
    assert learned.tokens == learned.correct == 1
