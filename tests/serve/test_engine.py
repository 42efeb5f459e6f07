"""The engine against the plain forward pass over one text at a time, token by token and without a cache."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.adapters import AdapterConfig
from cramjax.config import ModelConfig
from cramjax.errors import ConfigError, RunError
from cramjax.language_model import LanguageModel
from cramjax.model import make_model
from cramjax.serve.decoding import for_decoding
from cramjax.serve.engine import Engine
from cramjax.serve.prompts import never_drawn
from cramjax.serve.request import Progress, Request, SamplingParameters
from cramjax.serving import EngineConfig
from cramjax.training import Run

MakeRun = Callable[..., Run]

GREEDY = SamplingParameters(temperature=0.0)
SMALL = EngineConfig(slots=3, page=4, cache_tokens=128)


@pytest.fixture(scope="module")
def run(run_of: MakeRun) -> Run:
    return run_of(sequence_length=64, qk_norm=True, kv_heads=1)


@pytest.fixture(scope="module")
def engine(run: Run) -> Engine:
    return Engine(run.language_model, SMALL).prepare()


def finish(engine: Engine, requests: Sequence[Request]) -> list[list[Progress]]:
    """What each request got, all asked for at once."""
    got: list[list[Progress]] = [[] for _ in requests]
    for request, own in zip(requests, got, strict=True):
        engine.add(request, own.append)
    while engine.step():
        engine.pool.check()
    assert [own[-1].reason is not None for own in got] == [True] * len(got)
    assert engine.load().running == engine.load().waiting == engine.load().pages_used == 0
    return got


def tokens(got: Sequence[Progress]) -> list[int]:
    return [token for progress in got for token in progress.tokens]


@functools.cache
def _hidden(model: Any) -> Callable[..., Any]:
    return jax.jit(model.hidden)


def log_probabilities(model: LanguageModel, text: Sequence[int]) -> np.ndarray:
    """Of the tokens after each, by the whole forward pass: (tokens, vocab)."""
    padded = np.zeros((1, model.context), np.int32)
    padded[0, : len(text)] = text
    hidden = _hidden(model.model)(model.params, jnp.asarray(padded))[0]
    return np.asarray(jax.nn.log_softmax(model.model.logits(model.params, hidden), axis=-1))[: len(text)]


def greedy(model: LanguageModel, prompt: Sequence[int], number: int) -> list[int]:
    text = list(prompt)
    banned = list(never_drawn(model.tokenizer, model.model.vocab_size))
    for _ in range(number):
        row = log_probabilities(model, text)[-1].copy()
        row[banned] = -np.inf
        text.append(int(row.argmax()))
    return text[len(prompt) :]


def prompts(number: int, longest: int, seed: int = 0) -> list[tuple[int, ...]]:
    draw = np.random.default_rng(seed)
    return [tuple(draw.integers(5, 250, draw.integers(1, longest)).tolist()) for _ in range(number)]


def test_requests_beside_each_other_get_what_each_gets_alone(run: Run, engine: Engine) -> None:
    """Seven prompts in three slots, of unequal lengths, two with one beginning: the likeliest tokens every time."""
    own = prompts(6, 40)
    own.append((*own[0][:20], 7, 8, 9))
    before = engine.load().compilations
    got = finish(engine, [Request(prompt, 9, GREEDY) for prompt in own])
    assert engine.load().compilations == before
    for prompt, progress in zip(own, got, strict=True):
        assert tokens(progress) == greedy(run.language_model, prompt, 9)
        assert progress[-1].reason == "length"


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        {"window": 5, "mask_documents": True},
        {"bigram_buckets": 64, "tied": False, "adaptive_head": (64, 128), "activation": "swiglu"},
        {"positions": "learned", "logit_softcap": 15.0, "embedding_skip": True, "value_embeddings": True},
    ],
    ids=str,
)
def test_every_kind_of_model_is_continued_as_by_its_forward_pass(run_of: MakeRun, model: dict[str, Any]) -> None:
    language_model = run_of(sequence_length=64, **model).language_model
    separator = language_model.tokenizer.separator_id
    own = [*prompts(3, 30), (9, 8, separator, 7, 6, 5), (separator,)]
    got = finish(Engine(language_model, SMALL), [Request(prompt, 6, GREEDY) for prompt in own])
    assert [tokens(each) for each in got] == [greedy(language_model, prompt, 6) for prompt in own]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_stand_before_every_text(run_of: MakeRun, kind: Any) -> None:
    """A prompt's fill two pages that all rows share; texts that begin alike share theirs too."""
    given = run_of(sequence_length=64, mask_documents=True).language_model
    stack = make_model(
        ModelConfig(layers=2, width=32, heads=2, mlp=64, init_std=0.3, mask_documents=True),
        vocab_size=given.tokenizer.vocab_size,
        sequence_length=64 + 10,
        causal=True,
        separator_id=given.tokenizer.separator_id,
        adapter=AdapterConfig(kind, virtual_tokens=10),
    )
    params, keys = stack.init(jax.random.key(0)), iter(jax.random.split(jax.random.key(1), 99))
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), params)
    model = replace(given, model=stack, params=params)
    (first,) = prompts(1, 40, seed=3)
    own = [(5, 6), first, (9, 8, given.tokenizer.separator_id, 7, 6), (*first, 7, 8, 9)]
    engine = Engine(model, SMALL)
    assert engine.pool.size == (5 if kind == "prompt" else 4)
    right = [greedy(model, prompt, 4) for prompt in own]
    for _ in range(2):
        got = finish(engine, [Request(prompt, 4, GREEDY) for prompt in own])
        assert [tokens(each) for each in got] == right
    assert sum(each[-1].cached for each in got) > 0


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "int4"])
def test_weights_as_they_are_held_for_decoding(run: Run, weights: str) -> None:
    """One row and several, and prompts longer than what the kernel for a few rows takes."""
    model = for_decoding(run.language_model, weights)
    own = prompts(4, 40)
    got = finish(Engine(model, SMALL), [Request(prompt, 6, GREEDY) for prompt in own])
    assert [tokens(each) for each in got] == [greedy(model, prompt, 6) for prompt in own]


def test_log_probabilities_are_those_of_the_forward_pass(run: Run, engine: Engine) -> None:
    (prompt,) = prompts(1, 40, seed=3)
    prompt = (*prompt, 11, 12)
    (got,) = finish(engine, [Request(prompt, 5, GREEDY, top_logprobs=3, prompt_logprobs=True)])
    text = [*prompt, *tokens(got)]
    right = log_probabilities(run.language_model, text)
    given = [each for progress in got for each in (*progress.prompt_logprobs, *progress.logprobs)]
    assert [each.token for each in given] == text
    assert given[0].logprob is None and given[0].top == ()
    for each, row in zip(given[1:], right, strict=False):
        assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-4)  # float32, another order of sums
        best = np.argsort(-row)[:3]
        assert [token for token, _ in each.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in each.top], row[best], atol=1e-4)


def test_a_prompt_alone_can_be_scored(run: Run, engine: Engine) -> None:
    prompt = (5, 6, 7, 8)
    (got,) = finish(engine, [Request(prompt, 0, GREEDY, prompt_logprobs=True)])
    assert len(got) == 1 and got[0].tokens == () and got[0].reason == "length"
    right = log_probabilities(run.language_model, prompt)
    values = [each.logprob for each in got[0].prompt_logprobs[1:]]
    np.testing.assert_allclose(values, [right[i, t] for i, t in enumerate(prompt[1:])], atol=1e-4)


def test_a_text_that_begins_alike_finds_its_beginning(engine: Engine) -> None:
    prompt = tuple(range(20, 33))
    first, second = (finish(engine, [Request(prompt, 6, GREEDY)])[0] for _ in range(2))
    assert tokens(first) == tokens(second)
    assert first[-1].cached == 0 and second[-1].cached == 12  # three full pages of four; one token is always read


def test_where_pages_run_out_the_newest_is_computed_again(run: Run) -> None:
    engine = Engine(run.language_model, replace(SMALL, cache_tokens=64, prefix_cache=False))
    own = prompts(3, 8, seed=1)
    got = finish(engine, [Request(prompt, 40, GREEDY, prompt_logprobs=True) for prompt in own])
    assert engine.load().preemptions > 0
    for prompt, progress in zip(own, got, strict=True):
        assert tokens(progress) == greedy(run.language_model, prompt, 40)
        assert len([each for part in progress for each in part.prompt_logprobs]) == len(prompt)


@pytest.mark.slow
def test_where_pages_run_out_texts_that_begin_alike_are_computed_again(run: Run) -> None:
    """Who gives way has pages that others have too, and which nobody gets by it."""
    engine = Engine(run.language_model, replace(SMALL, slots=4, cache_tokens=64))
    beginning = tuple(range(20, 44))
    own, got = [(*beginning, 100 + number) for number in range(4)], [list[Progress]() for _ in range(4)]
    engine.add(Request(own[0], 30, GREEDY), got[0].append)
    engine.step()
    for prompt, each in zip(own[1:], got[1:], strict=True):
        engine.add(Request(prompt, 30, GREEDY), each.append)
    while engine.step():
        engine.pool.check()
    assert engine.load().preemptions > 0 and got[1][-1].cached > 0
    assert [tokens(each) for each in got] == [greedy(run.language_model, prompt, 30) for prompt in own]


def test_who_waits_for_pages_is_looked_for_once(run: Run) -> None:
    """Rounds in which it cannot come in count for nothing, and leave what is known as it was."""
    engine = Engine(run.language_model, replace(SMALL, cache_tokens=64))
    got = [list[Progress]() for _ in range(2)]
    for start, each in zip((20, 60), got, strict=True):  # each has ten of sixteen pages
        engine.add(Request(tuple(range(start, start + 40)), 20, GREEDY), each.append)
    waited = 0
    while engine.step():
        waited += engine.load().waiting
        assert engine.load().prefix_queries == 9 * (2 - engine.load().waiting)
    assert waited > 3 and [len(tokens(each)) for each in got] == [20, 20]


def test_a_token_that_stops_a_text_is_its_last(run: Run, engine: Engine) -> None:
    prompt = (9, 10, 11)
    whole = greedy(run.language_model, prompt, 12)
    stop = next(token for token in whole if token != whole[0])
    right = whole[: whole.index(stop) + 1]
    few, many = frozenset({stop, 299}), frozenset({*range(100)} - {*whole} | {stop})  # the device looks for 16
    got = finish(engine, [Request(prompt, 12, GREEDY, stop_tokens=stops) for stops in (few, many)])
    assert [tokens(each) for each in got] == [right, right]
    assert [each[-1].reason for each in got] == ["stop", "stop"]


def test_draws_do_not_depend_on_what_is_beside_them(run: Run) -> None:
    """Alone, among others, after others, in an engine of its own: the same tokens, in deterministic mode."""
    config = replace(SMALL, deterministic=True)
    drawn = SamplingParameters(temperature=1.0, seed=5)
    request = Request((5, 6, 7), 10, drawn)
    others = [Request(prompt, 7, replace(drawn, seed=seed)) for seed, prompt in enumerate(prompts(5, 30, seed=2))]
    engine = Engine(run.language_model, config)
    alone = tokens(finish(engine, [request])[0])
    assert tokens(finish(engine, [*others, request])[-1]) == alone
    assert tokens(finish(Engine(run.language_model, config), [request, *others])[0]) == alone
    assert tokens(finish(engine, [replace(request, sampling=replace(drawn, seed=6))])[0]) != alone


def test_a_cancelled_request_ends_and_leaves_nothing(engine: Engine) -> None:
    got: list[Progress] = []
    number = engine.add(Request((5, 6, 7), 40, GREEDY), got.append)
    engine.step()
    engine.cancel(number)
    assert got[-1].reason == "cancelled"
    assert not engine.step() and engine.load().pages_used == 0
    engine.cancel(number)  # it has ended: nothing happens


def test_penalties_and_biases_are_of_the_request_alone(run: Run, engine: Engine) -> None:
    prompt = (9, 10, 11)
    plain = greedy(run.language_model, prompt, 8)
    biased = replace(GREEDY, logit_bias=((42, 100.0),))
    never = replace(GREEDY, logit_bias=tuple((token, -100.0) for token in set(plain)))
    got = finish(engine, [Request(prompt, 8, way) for way in (GREEDY, biased, never)])
    assert tokens(got[0]) == plain and tokens(got[1]) == [42] * 8
    assert not set(tokens(got[2])) & set(plain)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 5), "one token or more"),
        (Request((5,) * 60, 5), r"at most 64 tokens together \(the context\), got 60 and 5"),
        (Request((5, 300), 5), "tokens from 0 to"),
        (Request((5,), 0), "max_tokens must be 1 or more, got 0"),
        (Request((5,), 1, SamplingParameters(logit_bias=((4000, 1.0),))), "logit_bias"),
    ],
)
def test_what_cannot_be_is_refused_at_once(engine: Engine, request_: Request, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.add(request_, lambda _: None)
    assert not engine.step()


def test_limits_that_contradict_each_other_are_refused(run: Run, run_of: MakeRun) -> None:
    with pytest.raises(ConfigError, match="cache_tokens must hold one context"):
        Engine(run.language_model, EngineConfig(cache_tokens=10))
    with pytest.raises(ConfigError, match="context must be at most 64 tokens"):
        Engine(run.language_model, EngineConfig(context=65))
    with pytest.raises(RunError, match="masked model"):
        Engine(run_of("masked").language_model)


@pytest.mark.slow
def test_a_thousand_requests_of_all_kinds_compile_nothing(engine: Engine) -> None:
    """Lengths, ways of drawing, scores, stops and cancellations as they come; pages are nobody's in the end."""
    draw, before, ended = np.random.default_rng(0), engine.load().compilations, [0] * 4
    reasons = ("stop", "length", "cancelled", "stuck")

    def listen(progress: Progress) -> None:
        if progress.reason is not None:
            ended[reasons.index(progress.reason)] += 1

    for number in range(1000):
        way = SamplingParameters(
            temperature=float(draw.choice([0.0, 0.7, 1.5])),
            top_k=int(draw.choice([0, 5, 40])),
            top_p=float(draw.choice([0.8, 1.0])),
            min_p=float(draw.choice([0.0, 0.1])),
            repetition_penalty=float(draw.choice([1.0, 1.2])),
            frequency_penalty=float(draw.choice([0.0, 0.5])),
            logit_bias=((7, 2.0),) if number % 9 == 0 else (),
            seed=number,
        )
        request = Request(
            tuple(draw.integers(5, 250, draw.integers(1, 56)).tolist()),
            int(draw.integers(1, 8)),
            way,
            frozenset(draw.integers(5, 250, draw.integers(0, 20)).tolist()),
            top_logprobs=3 if number % 5 == 0 else None,
            prompt_logprobs=number % 11 == 0,
        )
        asked = engine.add(request, listen)
        if number % 13 == 0:
            engine.step()
            engine.cancel(asked)
    while engine.step():
        pass
    engine.pool.check()
    load = engine.load()
    assert sum(ended) == 1000 and min(ended[:3]) > 0 and ended[3] == 0
    assert load.compilations == before and load.running == load.waiting == load.pages_used == 0
