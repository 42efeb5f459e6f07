"""The losses against log-probabilities of the logits, and masking against its definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import ObjectiveConfig
from cramjax.errors import ConfigError
from cramjax.model import Loss, objective_for
from cramjax.model.objectives import causal_loss, mask_tokens

from .small import CAUSAL, LENGTH, MASK, SEPARATOR, VOCAB, batch, build, trained_like


def _log_probabilities(model: Any, params: Any, tokens: jax.Array) -> np.ndarray:
    logits = np.asarray(jax.jit(lambda p, t: model.logits(p, model.hidden(p, t)))(params, tokens), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", [name for name, causal in CAUSAL.items() if causal])
def test_causal_loss_is_the_sum_over_next_tokens(name: str) -> None:
    model = build(name)
    params, tokens = trained_like(model), batch(LENGTH + 1)
    loss = jax.jit(lambda p: objective_for(ObjectiveConfig(), model)(p, tokens, None, 0.3, False))(params)
    each = np.take_along_axis(_log_probabilities(model, params, tokens[:, :-1]), np.asarray(tokens)[:, 1:, None], -1)
    assert float(loss.nll) == pytest.approx(-each.sum(), rel=1e-5)
    assert (float(loss.total), float(loss.tokens), float(loss.penalty)) == (float(loss.nll), 2 * LENGTH, 0)


def test_correct_predictions_are_counted() -> None:
    model = build("gpt2")
    params, tokens = trained_like(model), batch(LENGTH + 1)
    best = _log_probabilities(model, params, tokens[:, :-1]).argmax(-1)
    assert float(causal_loss(model, params, tokens).correct) == (best == np.asarray(tokens)[:, 1:]).sum()


def test_z_loss_adds_the_squared_log_partition() -> None:
    model = build("gpt2")
    params, tokens = trained_like(model), batch(LENGTH + 1)
    loss = objective_for(ObjectiveConfig(z_loss=0.1), model)(params, tokens, None, 0.0, False)
    logits = np.asarray(model.logits(params, model.hidden(params, tokens[:, :-1])), np.float64)
    assert float(loss.penalty) == pytest.approx(0.1 * (np.log(np.exp(logits).sum(-1)) ** 2).sum(), rel=1e-5)
    assert float(loss.total) == pytest.approx(float(loss.nll + loss.penalty), rel=1e-6)


@pytest.mark.parametrize("name", ["modern", "crammed", "bert"])
def test_gradient_is_the_slope_of_the_loss(name: str) -> None:
    model = build(name)
    params = trained_like(model)
    config = ObjectiveConfig(kind="causal" if CAUSAL[name] else "masked", z_loss=0.01)
    objective = objective_for(config, model, mask_id=MASK)
    tokens = batch(LENGTH + CAUSAL[name])

    @jax.jit
    def loss(params: Any) -> jax.Array:
        return objective(params, tokens, jax.random.key(0), 0.0, True).total

    gradients = jax.jit(jax.grad(loss))(params)
    slope = float(np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(gradients))))
    step = 1e-2 / slope
    up = loss(jax.tree.map(lambda p, g: p + step * g, params, gradients))
    down = loss(jax.tree.map(lambda p, g: p - step * g, params, gradients))
    # Along the gradient, the slope is the gradient's norm. A step of 0.01 leaves the third derivative's share
    # and float32 rounding of a loss near 100.
    assert float(up - down) / 2e-2 == pytest.approx(slope, rel=2e-2)


@pytest.mark.slow
def test_padded_rows_count_only_what_is_known() -> None:
    model = build("gpt2")
    params, tokens = trained_like(model), batch(LENGTH + 1)
    whole = causal_loss(model, params, tokens[:, :8])
    padded = causal_loss(model, params, tokens.at[:, 8:].set(-1), padded=True)
    assert float(padded.nll) == pytest.approx(float(whole.nll), rel=1e-5)
    assert float(padded.tokens) == float(whole.tokens) == 14


@pytest.mark.parametrize("name", ["crammed", "bert"])
def test_masked_loss_is_the_sum_over_masked_positions(name: str) -> None:
    model = build(name)
    params, tokens, key = trained_like(model), batch(), jax.random.key(5)
    objective = objective_for(ObjectiveConfig(kind="masked", mask_rate=0.4), model, mask_id=MASK)
    loss = jax.jit(lambda p: objective(p, tokens, key, 0.0, False))(params)
    masked = mask_tokens(tokens, jax.random.split(key)[0], 0.4, mask_rate_max=0.4, mask_id=MASK, vocab_size=VOCAB)
    every = _log_probabilities(model, params, masked.tokens)
    each = [every[b, p, tokens[b, p]] for b in range(2) for p in np.asarray(masked.positions)[b]]
    assert len(each) == 2 * round(0.4 * LENGTH) == float(loss.tokens)
    assert float(loss.nll) == pytest.approx(-sum(each), rel=1e-5)


def test_mask_rate_moves_with_the_spent_fraction_and_evaluation_keeps_the_last() -> None:
    model = build("crammed")
    params = trained_like(model)
    config = ObjectiveConfig(kind="masked", mask_rate=0.5, mask_rate_end=0.25)
    objective = objective_for(config, model, mask_id=MASK)

    def predictions(fraction: float, train: bool) -> float:
        call = jax.jit(lambda f: objective(params, batch(), jax.random.key(0), f, train))
        return float(call(fraction).tokens)

    assert [predictions(f, True) for f in (0.0, 0.5, 1.0)] == [2 * 6, 2 * round(0.375 * LENGTH), 2 * 3]
    assert predictions(0.0, False) == 2 * 3


def test_masking_is_80_10_10_at_exactly_the_rate() -> None:
    rows, length, rate = 400, 128, 0.25
    tokens = jax.random.randint(jax.random.key(0), (rows, length), 2, VOCAB).astype(jnp.int32)
    masked = mask_tokens(tokens, jax.random.key(1), rate, mask_rate_max=rate, mask_id=MASK, vocab_size=VOCAB)
    positions = np.asarray(masked.positions)
    assert positions.shape == (rows, 32) and all(len(set(row)) == 32 for row in positions)
    assert (np.take_along_axis(np.asarray(tokens), positions, 1) == masked.targets).all()
    new = np.take_along_axis(np.asarray(masked.tokens), positions, 1)
    untouched = np.ones((rows, length), bool)
    np.put_along_axis(untouched, positions, False, 1)
    assert (np.asarray(masked.tokens) == np.asarray(tokens))[untouched].all()
    # 12800 draws: five standard deviations are 0.018. A random token is by chance the mask or the same one in 2 of 50.
    became_mask, stayed = (new == MASK).mean(), (new == np.asarray(masked.targets)).mean()
    assert abs(became_mask - (0.8 + 0.1 / VOCAB)) < 0.018
    assert abs(stayed - (0.1 + 0.1 / VOCAB)) < 0.014
    everywhere = np.bincount(positions.ravel(), minlength=length) / rows
    assert abs(everywhere - rate).max() < 0.12  # 400 rows: five standard deviations of a share of 1/4 are 0.11


def test_separators_are_not_masked_when_they_tell_documents_apart() -> None:
    tokens = jnp.where(jnp.arange(16) % 2 == 0, SEPARATOR, 5)[None].astype(jnp.int32)
    masked = mask_tokens(
        tokens, jax.random.key(0), 0.5, mask_rate_max=0.5, mask_id=MASK, vocab_size=VOCAB, keep_id=SEPARATOR
    )
    assert sorted(np.asarray(masked.positions)[0].tolist()) == list(range(1, 16, 2))


@pytest.mark.slow
def test_metrics_carry_no_gradient() -> None:
    model = build("bare")
    params, tokens = trained_like(model), batch(LENGTH + 1)
    gradients = jax.grad(lambda p: causal_loss(model, p, tokens).nll)(params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


def test_masked_training_needs_a_mask_token_and_a_key() -> None:
    model = build("crammed")
    with pytest.raises(ConfigError, match=r"\[MASK\]"):
        objective_for(ObjectiveConfig(kind="masked"), model)
    with pytest.raises(ValueError, match="random key"):
        objective_for(ObjectiveConfig(kind="masked"), model, mask_id=MASK)(
            trained_like(model), batch(), None, 0.0, True
        )


def test_losses_of_microbatches_add_up() -> None:
    model = build("modern")
    params, tokens = trained_like(model), batch(LENGTH + 1)
    objective = jax.jit(objective_for(ObjectiveConfig(), model), static_argnums=4)
    whole = objective(params, tokens, None, 0.0, True)
    parts = [objective(params, row[None], None, 0.0, True) for row in tokens]
    summed = Loss(*(sum(values) for values in zip(*parts, strict=True)))
    np.testing.assert_allclose(np.asarray(summed), np.asarray(whole), rtol=1e-5)
