"""Guesses from how a text went on, and that what is answered with them is what is answered without."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cramjax.errors import ConfigError
from cramjax.serve.engine import Engine
from cramjax.serve.engine.lookup import guessed
from cramjax.serve.request import Request, SamplingParameters
from cramjax.serving import EngineConfig
from cramjax.training import Run

from .test_engine import GREEDY, SMALL, finish, tokens

MakeRun = Callable[..., Run]


def by_definition(text: Sequence[int], most: int) -> list[int]:
    """Read backwards for the end of the text, and go on from there over what has been guessed itself."""
    for size in (3, 2):
        for begin in range(len(text) - size - 1, -1, -1):
            if list(text[begin : begin + size]) == list(text[-size:]) and len(text) > size:
                whole, at = list(text), begin + size
                for _ in range(most):
                    whole.append(whole[at])
                    at += 1
                return whole[len(text) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 9))
def test_what_came_after_the_same_tokens_is_guessed_to_come_again(text: list[int], most: int) -> None:
    assert guessed(text, most) == by_definition(text, most)


def test_a_period_goes_on() -> None:
    assert guessed([9, 1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert guessed([1, 2, 3], 5) == []


@pytest.fixture(scope="module")
def run(run_of: MakeRun) -> Run:
    return run_of(sequence_length=128, qk_norm=True, kv_heads=1)


@pytest.fixture(scope="module")
def engines(run: Run) -> tuple[Engine, Engine]:
    """Without guesses, and with."""
    config = replace(SMALL, cache_tokens=384)
    return Engine(run.language_model, config), Engine(run.language_model, replace(config, lookup=5)).prepare()


REPEATS = tuple([20, 21, 22, 23, 24, 25] * 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParameters(temperature=0.7, seed=3),
        SamplingParameters(temperature=1.0, top_k=5, top_p=0.9, seed=2**40),
        SamplingParameters(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5),  # which gets no guesses
    ],
    ids=["greedy", "sampled", "narrowed", "penalised"],
)
def test_the_answer_is_the_same(engines: tuple[Engine, Engine], sampling: SamplingParameters) -> None:
    """Three at once, of unequal lengths, some that repeat: the same tokens, log-probabilities and reasons."""
    plain, guessing = engines
    own = [REPEATS, REPEATS[:9], (5, 6, 7, 8), REPEATS[3:]]
    requests = [
        Request(prompt, 60 - 11 * number, sampling, top_logprobs=2 if number == 1 else None)
        for number, prompt in enumerate(own)
    ]
    before = guessing.load()
    for one, other in zip(finish(plain, requests), finish(guessing, requests), strict=True):
        assert tokens(one) == tokens(other)
        assert one[-1].reason == other[-1].reason
        first, second = ([each for progress in got for each in progress.logprobs] for got in (one, other))
        assert [each.token for each in first] == [each.token for each in second]
        for a, b in zip(first, second, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    after = guessing.load()
    guesses = after.guessed_tokens - before.guessed_tokens
    assert (guesses == 0) if sampling.repetition_penalty != 1 else guesses > 0
    assert after.compilations == 0


@pytest.mark.slow
def test_greedy_texts_that_repeat_take_fewer_calls(engines: tuple[Engine, Engine]) -> None:
    """A small model falls into a loop, and guesses are right there; a stop token among them ends the text."""
    _, guessing = engines
    before = guessing.load()
    (progress,) = finish(guessing, [Request(REPEATS, 80, GREEDY)])
    after = guessing.load()
    drawn = tokens(progress)
    right = after.right_guesses - before.right_guesses
    assert 0 < right <= after.guessed_tokens - before.guessed_tokens
    assert max(len(each.tokens) for each in progress) > 1 and len(drawn) == 80
    end = next(i for i in range(len(drawn) - 1, 0, -1) if drawn[i] not in drawn[:i])
    (stopped,) = finish(guessing, [Request(REPEATS, 80, GREEDY, stop_tokens=frozenset({drawn[end]}))])
    assert tokens(stopped) == drawn[: end + 1] and stopped[-1].reason == "stop"


def test_guesses_are_refused_where_answers_must_not_depend_on_them(run: Run) -> None:
    with pytest.raises(ConfigError, match="lookup must be 0 with deterministic=true"):
        Engine(run.language_model, EngineConfig(slots=1, lookup=3, deterministic=True))
