"""Answers of a given shape: JSON, expressions and choices; the parrot says what it is allowed to."""

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from cramjax.serve.http.answering import Service

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SAYS = [{"role": "user", "content": "the stack"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def said(answer: dict[str, Any]) -> list[str]:
    return [c["text"] if "text" in c else c["message"]["content"] for c in answer["choices"]]


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("asked", "right"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}},
            lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None,
        ),
        (
            {"structured_outputs": {"json": json.dumps(SCHEMA)}},
            lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None,
        ),
        ({"structured_outputs": {"regex": "[ab]{3}🙂"}}, lambda text: re.fullmatch("[ab]{3}🙂", text)),
        ({"structured_outputs": {"choice": ["ja", "nein"]}}, lambda text: text in ("ja", "nein")),
        ({"structured_outputs": {"grammar": 'start: "x" start | "y"'}}, lambda text: re.fullmatch("x*y", text)),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_answers_have_the_shape_asked_for(client: TestClient, route: str, asked: Any, right: Callable[[str], Any]):
    body = {"prompt": "the"} if route == COMPLETIONS else {"messages": SAYS}
    answer = client.post(route, json=body | asked | {"max_tokens": 150, "n": 4, "seed": 2}).json()
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 4
    assert all(right(text) for text in said(answer)), said(answer)
    assert len({*said(answer)}) > 1


def test_a_json_object_is_one_as_far_as_it_goes(client: TestClient):
    body = {"prompt": "the", "max_tokens": 200, "response_format": {"type": "json_object"}, "n": 4}
    answer = client.post(COMPLETIONS, json=body).json()
    for choice in answer["choices"]:
        assert choice["text"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"structured_outputs": {"regex": "ja"}, "bad_words": "ja"}, "j"),
        ({"allowed_token_ids": [40], "bad_words": "#ONLY"}, ""),
        ({"allowed_token_ids": [40], "stop_token_ids": [40], "min_tokens": 3}, ""),
    ],
    ids=["grammar", "bad words", "late"],
)
def test_what_no_token_can_go_on_with_is_given_up(client: TestClient, service: Service, asked: Any, said: str):
    """It is said why."""
    if asked.get("bad_words") == "#ONLY":
        asked = asked | {"bad_words": service.served.model.tokenizer.decode([40])}
    (choice,) = client.post(COMPLETIONS, json={"prompt": "the", **asked}).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (said, "abort")
    assert "allows no token" in choice["stop_reason"]


def test_tokens_can_be_few_and_late(client: TestClient, service: Service):
    tokenizer = service.served.model.tokenizer
    few = [*tokenizer.encode("ab"), tokenizer.separator_id]
    body = {"prompt": "the", "max_tokens": 60, "allowed_token_ids": few, "min_tokens": 9, "return_token_ids": True}
    (choice,) = client.post(COMPLETIONS, json=body).json()["choices"]
    assert set(choice["token_ids"]) <= set(few) and not {*choice["token_ids"][:9]} & {*tokenizer.ends}
    assert choice["finish_reason"] == "stop" and len(choice["token_ids"]) > 9
