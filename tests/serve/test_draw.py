"""Draws by arrays of parameters against their definitions: sorted probabilities, and frequencies."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cramjax.serve.engine.draw import History, draw, narrowed, needs_history, ways
from cramjax.serve.request import SamplingParameters

VOCAB = 12


def kept_by_definition(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """By sorting; without ties."""
    order = np.argsort(-logits)
    kept = order[: top_k or None]
    probability = np.exp(logits[kept] - logits[kept].max())
    probability /= probability.sum()
    before = np.cumsum(probability) - probability
    kept = kept[: max(int(np.sum(before < top_p)), 1)]
    return {int(token) for token in kept if logits[token] >= logits.max() + np.log(max(min_p, 1e-30))}


_narrowed = jax.jit(narrowed)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(0, 70), st.sampled_from([0.3, 0.95, 0.999, 1.0]), st.sampled_from([1.0, 9.0]))
def test_of_many_tokens_too(seed: int, top_k: int, top_p: float, spread: float) -> None:
    """Where the last one kept is among the few that are looked at first, and where it is not."""
    logits = (np.random.default_rng(seed).normal(size=20_000) * spread).astype(np.float32)
    given = _narrowed(jnp.asarray(logits)[None], jnp.array([top_k]), jnp.array([top_p]), jnp.array([0.0]))[0]
    kept, right = set(np.flatnonzero(np.isfinite(given)).tolist()), kept_by_definition(logits, top_k, top_p, 0.0)
    # Sums of float32 in another order end at a token more or less where many are left over that are hardly probable.
    assert kept == right or (top_k == 0 and len(kept ^ right) <= 0.002 * len(right))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-80, 80), min_size=VOCAB, max_size=VOCAB, unique=True),
    st.integers(0, VOCAB + 3),
    st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.0]),
    st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)
def test_what_is_kept_is_what_the_definition_keeps(values: list[int], top_k: int, top_p: float, min_p: float) -> None:
    logits = np.array(values, np.float32) / 16 + np.linspace(0, 1e-3, VOCAB, dtype=np.float32)
    given = _narrowed(jnp.asarray(logits)[None], jnp.array([top_k]), jnp.array([top_p]), jnp.array([min_p]))[0]
    assert set(np.flatnonzero(np.isfinite(given)).tolist()) == kept_by_definition(logits, top_k, top_p, min_p)
    kept = np.isfinite(given)
    np.testing.assert_array_equal(np.asarray(given)[kept], logits[kept])


def test_tokens_that_tie_are_kept_together_and_infinities_stay_out() -> None:
    logits = jnp.array([[1.0, 1.0, 0.0, -jnp.inf, -0.0, -3.0]])
    given = _narrowed(logits, jnp.array([1]), jnp.array([1.0]), jnp.array([0.0]))
    assert np.isfinite(given).tolist() == [[True, True, False, False, False, False]]


def sampled(parameters: SamplingParameters, logits: np.ndarray, number: int) -> np.ndarray:
    """How often each token is drawn by requests that differ in their seeds alone."""
    rows = ways([replace(parameters, seed=seed) for seed in range(number)], number)
    every = jnp.broadcast_to(jnp.asarray(logits), (number, len(logits)))
    zero = jnp.zeros(number, jnp.int32)
    drawn = jax.jit(draw)(every, rows, History.empty(1, len(logits)), zero, zero)
    return np.bincount(np.asarray(drawn), minlength=len(logits))


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(),
        SamplingParameters(temperature=0.5, top_k=4),
        SamplingParameters(temperature=2.0, top_p=0.8),
        SamplingParameters(min_p=0.2),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_distribution(parameters: SamplingParameters) -> None:
    logits = np.random.default_rng(0).normal(size=8).astype(np.float32) * 1.5
    scaled = logits.astype(np.float64) / parameters.temperature
    kept = kept_by_definition(scaled, parameters.top_k, parameters.top_p, parameters.min_p)
    probability = np.array([np.exp(x) if token in kept else 0.0 for token, x in enumerate(scaled)])
    probability /= probability.sum()
    counts = sampled(parameters, logits, 4000)
    assert not counts[probability == 0].any()
    found = probability > 0
    assert stats.chisquare(counts[found], 4000 * probability[found]).pvalue > 1e-3


def test_a_row_is_drawn_the_same_whatever_is_beside_it() -> None:
    logits = jax.random.normal(jax.random.key(1), (3, VOCAB))
    rows = [
        SamplingParameters(temperature=0.7, seed=3),
        SamplingParameters(top_k=2, seed=1 << 40),
        SamplingParameters(temperature=0.0),
    ]
    history, numbers = History.empty(1, VOCAB), jnp.array([4, 5, 6])
    zero = jnp.zeros(3, jnp.int32)
    together = draw(logits, ways(rows, 3), history, zero, numbers)
    for place, row in enumerate(rows):
        part = slice(place, place + 1)
        alone = draw(logits[part], ways([row], 1), history, zero[:1], numbers[part])
        assert int(alone[0]) == int(together[place])
    assert int(together[2]) == int(jnp.argmax(logits[2]))


def test_penalties_and_biases_are_openais_and_ctrls() -> None:
    """Greedy over logits changed by hand; a row without penalties is not touched by its slot's history."""
    logits = jnp.tile(jnp.array([[2.0, 1.9, -1.0, -1.1]]), (5, 1))
    rows = [
        SamplingParameters(temperature=0.0),
        SamplingParameters(temperature=0.0, frequency_penalty=0.06),  # 2.0 - 2 * 0.06 < 1.9
        SamplingParameters(temperature=0.0, presence_penalty=0.05),  # 2.0 - 0.05 > 1.9
        SamplingParameters(temperature=0.0, repetition_penalty=1.1),  # 2.0 / 1.1 < 1.9
        SamplingParameters(temperature=0.0, logit_bias=((3, 5.0),)),
    ]
    history = History.empty(2, 4)
    none, no_bias = jnp.array([9]), jnp.array([0.0])
    history = history.begun(jnp.int32(0), none, jnp.array([0, 0]), none, no_bias)
    history = history.begun(jnp.int32(1), none, none, jnp.array([3]), jnp.array([5.0]))
    slots = jnp.array([0, 0, 0, 0, 1])
    tokens = draw(logits, ways(rows, 5), history, slots, jnp.zeros(5, jnp.int32))
    assert tokens.tolist() == [0, 1, 0, 1, 3]
    assert [needs_history(row) for row in rows] == [False, True, True, True, True]
    again = history.begun(jnp.int32(0), none, none, none, no_bias)  # a new request in the slot
    assert draw(logits, ways(rows, 5), again, slots, jnp.zeros(5, jnp.int32)).tolist() == [0, 0, 0, 0, 3]
    prompt = history.begun(jnp.int32(0), jnp.array([0]), none, none, no_bias)  # only repetition counts prompts
    assert draw(logits, ways(rows, 5), prompt, slots, jnp.zeros(5, jnp.int32)).tolist() == [0, 0, 0, 1, 3]
