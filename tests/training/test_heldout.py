"""Held-out scores depend on the text and the model, and on nothing that is only about how they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import ModelConfig, ObjectiveConfig
from cramjax.data import TokenFile
from cramjax.model import make_model, objective_for
from cramjax.parallel import batch_sharding, make_mesh, replicated
from cramjax.training.heldout import HeldOut

_LENGTH, _VOCAB = 16, 50
_TOKENS = np.random.default_rng(0).integers(2, _VOCAB, 8 * _LENGTH + 5).astype(np.uint16)  # the last one is cut short


@pytest.mark.slow
def test_masked_scores_are_the_same_whatever_the_batch_and_the_devices() -> None:
    config = ModelConfig(layers=1, width=16, heads=2, mlp=16)
    model = make_model(config, vocab_size=_VOCAB, sequence_length=_LENGTH, causal=False)
    objective = objective_for(ObjectiveConfig(kind="masked", mask_rate=0.3), model, mask_id=1)
    params = jax.tree.map(lambda p: 30 * p, model.init(jax.random.key(0)))  # far from uniform predictions
    file = TokenFile(_TOKENS, 4 * len(_TOKENS))

    def score(batch: int, devices: int = 1, most: int | None = None):
        held_out, given = HeldOut(objective, file, _LENGTH, causal=False, batch=batch), params
        if devices > 1:
            mesh = make_mesh(devices, 1)
            place = batch_sharding(mesh)
            held_out = HeldOut(
                objective, file, _LENGTH, causal=False, batch=batch, put=lambda rows: jax.device_put(rows, place)
            )
            given = jax.device_put(params, replicated(mesh))
        return held_out.evaluate(given, most)

    first = score(1)
    for other in (score(3), score(8), score(8, devices=8)):
        # The same numbers, summed in float32 within a batch.
        assert other.loss == pytest.approx(first.loss, rel=1e-6)
        assert (other.tokens, other.accuracy) == (first.tokens, pytest.approx(first.accuracy, abs=1e-9))
    assert score(4, most=4 * _LENGTH).loss == pytest.approx(score(1, most=4 * _LENGTH).loss, rel=1e-6)


def test_every_row_of_keys_masks_its_row_alone() -> None:
    config = ModelConfig(layers=1, width=16, heads=2, mlp=16)
    model = make_model(config, vocab_size=_VOCAB, sequence_length=_LENGTH, causal=False)
    objective = objective_for(ObjectiveConfig(kind="masked", mask_rate=0.5), model, mask_id=1)
    rows, keys = jnp.asarray(_TOKENS[: 4 * _LENGTH].reshape(4, -1), jnp.int32), jax.random.split(jax.random.key(3), 4)
    whole = objective.task(rows, keys, 1.0, False)
    for at in range(4):
        alone = objective.task(rows[at : at + 1], keys[at : at + 1], 1.0, False)
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[at])
        np.testing.assert_array_equal(alone.targets, whole.targets.reshape(4, -1)[at])
    assert (whole.tokens[0] != whole.tokens[1]).any()


def test_sequences_of_anothers_model_begin_with_its_own_token() -> None:
    """Every token but the first is predicted once, each after the begin token and what its own sequence has of it."""
    begin = 1
    model = make_model(
        ModelConfig(layers=1, width=16, heads=2, mlp=16), vocab_size=_VOCAB, sequence_length=_LENGTH, causal=True
    )
    objective = objective_for(ObjectiveConfig(), model)
    params = jax.tree.map(lambda p: 30 * p, model.init(jax.random.key(0)))
    file = TokenFile(_TOKENS, 4 * len(_TOKENS))
    found = HeldOut(objective, file, _LENGTH, causal=True, batch=4, begin=begin).evaluate(params)
    total = 0.0
    for start in range(1, len(_TOKENS), _LENGTH):
        targets = _TOKENS[start : start + _LENGTH].astype(int)
        seen = jnp.asarray([[begin, *targets[:-1]]])
        logits = np.asarray(model.logits(params, model.hidden(params, seen))[0], np.float64)
        total += sum(np.logaddexp.reduce(row) - row[target] for row, target in zip(logits, targets, strict=True))
    assert found.tokens == len(_TOKENS) - 1
    assert found.loss == pytest.approx(total / found.tokens, rel=1e-5)
    plain = HeldOut(objective, file, _LENGTH, causal=True, batch=4).evaluate(params)
    assert abs(plain.loss - found.loss) > 1e-3
