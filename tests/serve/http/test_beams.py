"""Beam search over HTTP: the hypotheses of `cramjax.serve.beam`, and what cannot be combined with it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from cramjax.language_model import LanguageModel
from cramjax.serve.beam import BeamSearch, search_tokens
from cramjax.serve.engine import Engine
from cramjax.serve.engine.batch import few_shapes
from cramjax.serve.http.answering import Service
from cramjax.serve.http.app import make_app, make_service
from cramjax.serve.prompts import encoded_prompts, never_drawn, text_after
from cramjax.server import ServeConfig
from cramjax.serving import EngineConfig

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "the stack", "max_tokens": 3},
    CHAT: {"messages": [{"role": "user", "content": "the stack"}], "max_tokens": 3},
}


@pytest.fixture(scope="module")
def model(spoken: LanguageModel) -> LanguageModel:
    """Computed in float32 everywhere: beams that are nearly alike are told apart."""
    return replace(spoken, model=replace(spoken.model, compute_dtype="float32"))


@pytest.fixture(scope="module")
def searched(model: LanguageModel) -> Iterator[TestClient]:
    config = EngineConfig(slots=4, context=64, page=8, cache_tokens=512)
    engine = Engine(model, config, few_shapes(config, model, 20))
    service = make_service(model, engine, ServeConfig(name="tiny", engine=engine.config))
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        yield client
    assert engine.load().prefix_hits > 50, "beginnings are read once"
    assert engine.load().running == engine.load().waiting == 0 and not service.worker._places


@pytest.mark.slow
@pytest.mark.parametrize(("number", "penalty"), [(5, 1.0), (5, 0.0), (5, 2.5)])
def test_the_hypotheses_are_those_of_beam_search(
    searched: TestClient, model: LanguageModel, number: int, penalty: float
):
    prompts = ["the stack walks", "every token pays for its own place"]
    body = {"prompt": prompts, "max_tokens": 12, "n": number, "use_beam_search": True, "length_penalty": penalty}
    whole = searched.post(COMPLETIONS, json=body | {"logprobs": 2, "return_token_ids": True}).json()
    starts, rows = encoded_prompts(model, prompts, chat=False)
    search = BeamSearch(number, penalty)
    hypotheses = [
        (row, start, own)
        for row, start in zip(rows, starts, strict=True)
        for own in search_tokens(model, row, search, 12)
    ]
    assert [choice["index"] for choice in whole["choices"]] == list(range(len(hypotheses)))
    for choice, (row, start, found) in zip(whole["choices"], hypotheses, strict=True):
        assert choice["token_ids"] == list(found.tokens)
        shown = [token for token in found.tokens if token not in model.tokenizer.ends]
        assert choice["text"] == text_after(model.tokenizer, row[start:], shown)
        assert choice["finish_reason"] == ("stop" if found.ended else "length")
        sums = sum(choice["logprobs"]["token_logprobs"])
        np.testing.assert_allclose(sums, found.log_probability, atol=2e-3)  # a dozen sums in float32, by two ways
    assert whole["usage"]["completion_tokens"] == sum(len(each.tokens) for _, _, each in hypotheses)


@pytest.mark.slow
def test_tokens_that_are_never_drawn_take_no_candidates_place(model: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    """Of the likeliest 20 after the prompt most are banned: there are as many answers as ever, and the same."""
    (row,) = encoded_prompts(model, ["the stack"], chat=False)[1]
    likely = [each.tokens[0] for each in search_tokens(model, row, BeamSearch(16), 1)]
    banned = tuple(sorted({*likely, *never_drawn(model.tokenizer, model.model.vocab_size)} - {*model.tokenizer.ends}))
    monkeypatch.setattr("cramjax.serve.beam.never_drawn", lambda *_: banned)
    monkeypatch.setattr("cramjax.serve.engine.engine.never_drawn", lambda *_: banned)
    config = EngineConfig(slots=4, context=64, page=8, cache_tokens=512)
    service = make_service(model, Engine(model, config, few_shapes(config, model, 20)), ServeConfig(engine=config))
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        for most in (1, 3):
            body = {"prompt": "the stack", "max_tokens": most, "n": 16, "use_beam_search": True}
            choices = client.post(COMPLETIONS, json=body | {"return_token_ids": True}).json()["choices"]
            expected = [list(each.tokens) for each in search_tokens(model, row, BeamSearch(16), most)]
            assert [choice["token_ids"] for choice in choices] == expected
            assert all(choice["finish_reason"] for choice in choices)


@pytest.mark.slow
def test_searches_and_draws_go_on_beside_each_other(searched: TestClient, model: LanguageModel):
    chat = BODIES[CHAT] | {"max_tokens": 10, "n": 5, "use_beam_search": True}
    drawn = BODIES[COMPLETIONS] | {"max_tokens": 20, "seed": 1, "n": 2}
    alone = [searched.post(CHAT, json=chat).json(), searched.post(COMPLETIONS, json=drawn).json()]
    with ThreadPoolExecutor(4) as pool:
        asked = [(CHAT, chat), (COMPLETIONS, drawn)] * 2
        together = [*pool.map(lambda one: searched.post(one[0], json=one[1]).json(), asked)]
    for found, expected in zip(together, alone * 2, strict=True):
        assert found["choices"] == expected["choices"]
    (row,) = encoded_prompts(model, ["the stack"], chat=True)[1]
    ends, best = model.tokenizer.ends, search_tokens(model, row, BeamSearch(5), 10)
    texts = [model.tokenizer.decode([token for token in each.tokens if token not in ends]) for each in best]
    assert [choice["message"]["content"] for choice in alone[0]["choices"]] == texts
    scored = {"prompt": "the stack", "max_tokens": 2, "echo": True, "logprobs": 1}
    echoed, other = (
        searched.post(COMPLETIONS, json=scored | more).json()["choices"][0]
        for more in ({"use_beam_search": True}, {"temperature": 0})
    )
    assert echoed["text"] == other["text"] and echoed["text"].startswith("the stack"), "one beam is greedy"
    assert echoed["logprobs"]["tokens"] == other["logprobs"]["tokens"]


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"stream": True}, "stream"),
        ({"temperature": 0.5}, "temperature"),
        ({"top_p": 0.5}, "top_p"),
        ({"top_k": 5}, "top_k"),
        ({"min_p": 0.5}, "min_p"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"repetition_penalty": 1.5}, "repetition_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"stop": ["a"]}, "stop"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"n": 20}, "n"),
        ({"n": 10, "stop_token_ids": [*range(5, 16)]}, "n"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty"),
        ({"use_beam_search": 1}, "use_beam_search"),
    ],
)
def test_what_excludes_a_search_is_named(client: TestClient, route: str, change: dict[str, Any], field: str):
    answer = client.post(route, json=BODIES[route] | {"use_beam_search": True} | change)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field, answer.text


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_what_asks_for_nothing_is_fine_with_a_search(client: TestClient, route: str):
    neutral = {"temperature": 0, "top_p": 1, "top_k": -1, "stop": [], "seed": 3, "response_format": {"type": "text"}}
    answer = client.post(route, json=BODIES[route] | {"use_beam_search": True, "n": 3} | neutral)
    assert answer.status_code == 200, answer.text
    assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1, 2]


def test_an_engine_that_ends_ends_searches(service_of: Callable[..., Service]):
    service = service_of()
    service.worker.engine.fault = RuntimeError("no memory")  # type: ignore[attr-defined]
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        body = BODIES[COMPLETIONS] | {"use_beam_search": True, "n": 3, "prompt": ["a", "b"]}
        answer = client.post(COMPLETIONS, json=body)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_error"
        assert service.worker._places == 0
