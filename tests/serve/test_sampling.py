"""Sampling against the definitions, in numpy, and against the laws of large numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ConfigError
from cramjax.serve.sampling import Sampling, filter_logits, sample


def logits_of(seed: int, batch: int = 5, vocab: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, vocab)).astype(np.float32) * 2


def kept_by_definition(logits: np.ndarray, sampling: Sampling) -> list[set[int]]:
    kept = []
    for row in logits.astype(np.float64) / sampling.temperature:
        order = list(np.argsort(-row))[: sampling.top_k]
        p = np.exp(row[order] - row[order].max())
        p /= p.sum()
        if sampling.top_p is not None:
            total, nucleus = 0.0, []
            for token, probability in zip(order, p, strict=True):
                nucleus.append(token)
                total += probability
                if total >= sampling.top_p:
                    break
            order = nucleus
        kept.append({int(t) for t in order})
    return kept


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(top_k=1),
        Sampling(top_k=7),
        Sampling(top_k=1000),
        Sampling(top_p=0.3),
        Sampling(top_p=0.9),
        Sampling(top_p=1e-6),
        Sampling(temperature=0.7, top_k=12, top_p=0.8),
    ],
    ids=str,
)
def test_the_filter_keeps_what_the_definition_keeps(sampling: Sampling):
    logits = logits_of(0)
    filtered = np.asarray(filter_logits(jnp.asarray(logits), sampling))
    assert [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in filtered] == kept_by_definition(logits, sampling)
    kept = np.isfinite(filtered)
    np.testing.assert_allclose(filtered[kept], (logits / sampling.temperature)[kept], rtol=1e-6)


def test_zero_temperature_is_greedy():
    logits = logits_of(1)
    keys = jax.random.split(jax.random.key(0), len(logits))
    assert sample(jnp.asarray(logits), keys, Sampling(temperature=0.0)).tolist() == logits.argmax(-1).tolist()


def test_draws_follow_the_softmax():
    logits = jnp.array([0.0, 1.0, 2.0, -1.0])
    draws = 20_000
    rows = jnp.broadcast_to(logits, (draws, 4))
    tokens = sample(rows, jax.random.split(jax.random.key(3), draws), Sampling(temperature=1.5))
    frequency = np.bincount(np.asarray(tokens), minlength=4) / draws
    expected = np.exp(np.asarray(logits, np.float64) / 1.5)
    # Four standard errors of a frequency from 20,000 draws.
    np.testing.assert_allclose(frequency, expected / expected.sum(), atol=4 * 0.5 / np.sqrt(draws))


def test_a_row_does_not_depend_on_its_neighbours():
    logits = jnp.asarray(logits_of(2))
    keys = jax.random.split(jax.random.key(5), 5)
    together = sample(logits, keys, Sampling(top_k=20))
    alone = [int(sample(logits[i : i + 1], keys[i : i + 1], Sampling(top_k=20))[0]) for i in range(5)]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_impossible_values_are_named(bad: dict):
    name, value = next(iter(bad.items()))
    with pytest.raises(ConfigError, match=f"{name} must be .*got {value}"):
        Sampling(**bad)
