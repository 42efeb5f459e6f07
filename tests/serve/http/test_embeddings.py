"""Embeddings over HTTP: those that `embed` gives, in batches of whoever asks at once."""

import base64
import concurrent.futures
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from cramjax.embeddings import EmbeddingConfig
from cramjax.language_model import LanguageModel
from cramjax.serve import embed
from cramjax.serve.embedder import Embedder, TextToEmbed
from cramjax.serve.http.app import make_app, make_service
from cramjax.serve.lengths.triggers import Lazy
from cramjax.server import ServeConfig

ROUTE = "/v1/embeddings"
CLOSE = 5e-3
"""Of numbers below 1: some machines compute in bfloat16, and other shapes of batches round otherwise."""
TEXTS = ["the stack walks", "block by block", "🙂", "every token pays for its own place", "the stack walks"]


@pytest.fixture(scope="module")
def model(run_of: Callable[..., Any]) -> LanguageModel:
    return run_of("masked", sequence_length=64).language_model


@pytest.fixture(scope="module")
def client(model: LanguageModel) -> Iterator[TestClient]:
    service = make_service(model, Embedder(model), ServeConfig(name="encoder", queue=4))
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        yield client


def vectors(answer: Any) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [each["index"] for each in data] == list(range(len(data)))
    return np.array([each["embedding"] for each in data], np.float32)


def test_texts_and_tokens_have_the_vectors_of_the_model(client: TestClient, model: LanguageModel):
    expected = embed(model, TEXTS)
    answer = client.post(ROUTE, json={"input": TEXTS, "model": "encoder"})
    np.testing.assert_allclose(vectors(answer), expected, atol=CLOSE)
    usage = answer.json()["usage"]
    ids = [client.post("/tokenize", json={"prompt": t, "add_special_tokens": False}).json()["tokens"] for t in TEXTS]
    assert usage["prompt_tokens"] == usage["total_tokens"] == sum(len(each) + 2 for each in ids)
    np.testing.assert_allclose(vectors(client.post(ROUTE, json={"input": TEXTS[1]})), expected[1:2], atol=CLOSE)
    np.testing.assert_allclose(vectors(client.post(ROUTE, json={"input": ids})), embed(model, ids), atol=CLOSE)
    as_bytes = client.post(ROUTE, json={"input": TEXTS[0], "encoding_format": "base64"}).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(as_bytes), "<f4"), expected[0], atol=CLOSE)


def test_those_who_ask_at_once_each_get_their_own(client: TestClient, model: LanguageModel):
    texts = [f"{text} {number}" for number, text in enumerate(TEXTS * 6)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda text: vectors(client.post(ROUTE, json={"input": text}))[0], texts))
    expected = embed(model, texts)
    np.testing.assert_allclose(answers, expected, atol=CLOSE)
    assert np.abs(expected[:, None] - expected).max(axis=-1)[~np.eye(len(texts), dtype=bool)].min() > CLOSE


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", 3]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": "block " * 100}, "input"),
        ({"input": ["a"] * 3000}, "input"),
        ({"input": "a", "encoding_format": "bits"}, "encoding_format"),
        ({"input": "a", "dimensions": 7}, "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"input": "a", "model": "other"}, "model"),
        ({"input": "a", "inputs": "b"}, "inputs"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_field_is_an_error_that_names_it(client: TestClient, body: dict[str, Any], field: str):
    answer = client.post(ROUTE, json=body)
    assert answer.status_code == (404 if body.get("model") else 400) and answer.json()["error"]["param"] == field


def test_an_encoder_answers_with_nothing_else(client: TestClient):
    for route, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        error = client.post(route, json=body).json()["error"]
        assert error["code"] == "unsupported" and "makes embeddings, and no text" in error["message"]
    assert client.get("/v1/models").json()["data"][0]["makes"] == "embeddings"
    assert client.post(ROUTE, json={"input": "block " * 100, "truncate_prompt_tokens": -1}).status_code == 200
    assert client.get("/metrics").status_code == 200


def test_alone_each_text_is_embedded_by_itself(model: LanguageModel):
    """And a model that says how its vectors are made is an embedder, causal or not."""
    embedder, got = Embedder(replace(model, embedding=EmbeddingConfig("cls")), alone=True), []
    for _ in range(3):
        embedder.add(TextToEmbed((5, 6, 7)), got.append)
    embedder.cancel(1)
    assert embedder.step() and len(got) == 2 and embedder.step() and not embedder.step()
    assert [each.reason for each in got] == ["cancelled", "stop", "stop"] and got[0].vector is None
    assert (got[1].vector == got[2].vector).all()


def test_a_lazy_one_waits_for_company(model: LanguageModel):
    embedder, got = Embedder(model, trigger=Lazy(patience=3600.0, enough=2)), []
    assert not embedder.step()
    embedder.add(TextToEmbed((5, 6, 7)), got.append)
    assert embedder.step() and not got
    embedder.add(TextToEmbed((5, 6)), got.append)
    assert embedder.step() and len(got) == 2
