"""What is refused, by the rules that clients of OpenAI know (and vLLM's validators have), and what is not."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SAYS = [{"role": "user", "content": "the stack"}]
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "the", "max_tokens": 3},
    CHAT: {"messages": SAYS, "max_tokens": 3},
}


def nested(depth: int) -> str:
    """JSON of objects in objects."""
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("depth", [65, 300, 900, 100_000])
@pytest.mark.parametrize("name", ["chat_template_kwargs", "tools", "temperature", "response_format", "messages"])
def test_what_is_nested_too_deep_is_refused_with_its_name(client: TestClient, name: str, depth: int):
    body = json.dumps(BODIES[CHAT] | {name: "#"}).replace('"#"', nested(depth))
    answer = client.post(CHAT, content=body)
    assert answer.status_code == 400
    if depth < 1000:  # past that it is no JSON to the parser
        assert answer.json()["error"]["param"] == name and "at most 64 deep" in answer.json()["error"]["message"]


def test_what_is_nested_as_deep_as_may_be_is_served(client: TestClient):
    body = json.dumps(BODIES[CHAT] | {"chat_template_kwargs": "#"}).replace('"#"', nested(64))
    assert client.post(CHAT, content=body).status_code == 200


def test_arguments_of_calls_are_nested_no_deeper(client: TestClient):
    called = {"function": {"name": "look", "arguments": nested(900)}}
    answer = client.post(CHAT, json={"messages": [{"role": "assistant", "tool_calls": [called]}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].tool_calls[0].function.arguments"


_SCHEMA = "response_format.json_schema.schema"
_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
RULES = [
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, True]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [10**9]}, "prompt"),
    (COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
    (COMPLETIONS, {"prompt": "\ud800"}, "prompt"),
    (COMPLETIONS, {"prompt": "block " * 300}, "prompt"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 1.5}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": True}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 10**6}, "prompt"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (COMPLETIONS, {"logprobs": "1"}, "logprobs"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"suffix": "x"}, "suffix"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
    (COMPLETIONS, {"echo": 1}, "echo"),
    (COMPLETIONS, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    (COMPLETIONS, {"truncation_side": "middle"}, "truncation_side"),
    (COMPLETIONS, {"model": "other"}, "model"),
    (COMPLETIONS, {"model": 3}, "model"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": ["hi"]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}, "messages[0].tool_calls[0]"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages[0]"),  # this template has none
    (CHAT, {"tools": [_TOOL]}, "tools"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": 2}, "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    (CHAT, {"continue_final_message": True}, "continue_final_message"),  # the last message is the user's
    (CHAT, {"echo": True}, "echo"),
    (CHAT, {"tools": []}, "tools"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools[0]"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    (CHAT, {"tools": [_TOOL, _TOOL]}, "tools[1].function.name"),
    (CHAT, {"tools": [_TOOL], "tool_choice": "always"}, "tool_choice"),
    (CHAT, {"tool_choice": "auto"}, "tool_choice"),
    (CHAT, {"chat_template": "{{ messages }}"}, "chat_template"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    *[
        (route, change, field)
        for route in (COMPLETIONS, CHAT)
        for change, field in [
            ({"stream_options": {"include_usage": True}}, "stream_options"),
            ({"stream": True, "stream_options": 3}, "stream_options"),
            ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
            ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
            ({"stream": "yes"}, "stream"),
            ({"n": 0}, "n"),
            ({"n": 10_000}, "n"),
            ({"n": 100}, "n"),  # more than slots and queue hold
            ({"temperature": -1}, "temperature"),
            ({"temperature": "hot"}, "temperature"),
            ({"temperature": 10**400}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"top_p": 1.1}, "top_p"),
            ({"top_k": -2}, "top_k"),
            ({"min_p": 2}, "min_p"),
            ({"presence_penalty": 3}, "presence_penalty"),
            ({"frequency_penalty": []}, "frequency_penalty"),
            ({"repetition_penalty": 0}, "repetition_penalty"),
            ({"seed": 2**63}, "seed"),
            ({"seed": 1.0}, "seed"),
            ({"stop": ""}, "stop"),
            ({"stop": ["a", 1]}, "stop"),
            ({"stop": ["a"] * 17}, "stop"),
            ({"stop_token_ids": [10**9]}, "stop_token_ids"),
            ({"logit_bias": {"a": 1}}, "logit_bias"),
            ({"logit_bias": {"1": 101}}, "logit_bias"),
            ({"logit_bias": [1]}, "logit_bias"),
            ({"logit_bias": {"99999999": 1}}, "logit_bias"),
            ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
            ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema"),
            ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, _SCHEMA),
            ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}}, _SCHEMA),
            ({"response_format": {}}, "response_format.type"),
            ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
            ({"response_format": {"type": "poem"}}, "response_format.type"),
            ({"guided_regex": "a+"}, "guided_regex"),
            ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
            ({"structured_outputs": {}}, "structured_outputs"),
            ({"structured_outputs": {"json": {}}, "response_format": {"type": "json_object"}}, "structured_outputs"),
            ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex"),
            ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
            ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
            ({"structured_outputs": {"choice": ["a", 3]}}, "structured_outputs.choice"),
            ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
            ({"structured_outputs": {"json": "no schema"}}, "structured_outputs.json"),
            ({"structured_outputs": {"json": {"type": 5}}}, "structured_outputs.json"),
            ({"structured_outputs": {"tree": {}}}, "structured_outputs.tree"),
            ({"allowed_token_ids": []}, "allowed_token_ids"),
            ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
            ({"bad_words": [""]}, "bad_words"),
            ({"cache_salt": 3}, "cache_salt"),
            ({"use_beam_search": True, "stream": True}, "stream"),
            ({"priority": 1}, "priority"),
            ({"logits_processors": ["a"]}, "logits_processors"),
            ({"min_tokens": -1}, "min_tokens"),
            ({"length_penalty": 2}, "length_penalty"),
            ({"temprature": 1}, "temprature"),
        ]
    ],
]


@pytest.mark.parametrize(("route", "change", "field"), RULES, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_an_error_that_names_it(client: TestClient, route: str, change: dict[str, Any], field: str):
    body = json.dumps(BODIES[route] | change)
    answer = client.post(route, content=body)
    assert answer.status_code == (404 if change == {"model": "other"} else 400), answer.text
    error = answer.json()["error"]
    assert error["param"] == field and error["message"] and error["type"]


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": None, "temperature": None, "stop": None, "n": None, "seed": None, "logit_bias": None},
        {"seed": -(2**63), "user": "me", "metadata": {}, "top_k": -1, "stop": [], "response_format": {"type": "text"}},
        {"logit_bias": {"7": -100, "8": 1.5}, "presence_penalty": 2, "stop": ["zz", "yy"], "temperature": 0},
        {"stream_options": None, "stream": False, "tools": None, "suffix": None} | {"ignore_eos": True},
    ],
)
def test_what_is_null_or_asks_for_nothing_is_fine(client: TestClient, route: str, change: dict[str, Any]):
    change = {k: v for k, v in change.items() if k != ("tools" if route == COMPLETIONS else "suffix")}
    answer = client.post(route, json=BODIES[route] | change)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000, b"9" * 5000, b'{"a": "\\ud800"}']
)
@pytest.mark.parametrize("route", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_what_is_no_object_is_400(client: TestClient, route: str, body: bytes):
    answer = client.post(route, content=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
_NAMES = sorted({field.partition(".")[0].partition("[")[0] for _, _, field in RULES})


@given(route=st.sampled_from([COMPLETIONS, CHAT]), change=st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=3))
@settings(max_examples=150, deadline=None)
def test_no_body_is_the_servers_mistake(client: TestClient, route: str, change: dict[str, Any]):
    body = json.dumps(BODIES[route] | change)
    assert client.post(route, content=body).status_code in (200, 400, 404), body


def test_other_paths_and_methods_are_errors_too(client: TestClient):
    for method, path, status in (("GET", "/nowhere", 404), ("GET", COMPLETIONS, 405), ("POST", "/v1/models", 405)):
        answer = client.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["message"]
    assert client.get("/v1/models/other").status_code == 404
    assert client.post("/v1/embeddings", json={"input": "a"}).json()["error"]["code"] == "unsupported"


def test_what_the_description_says_is_what_is_read(client: TestClient):
    """Every field is described, and a body that the description forbids is refused."""
    described = client.get("/openapi.json").json()
    jsonschema.Draft202012Validator.check_schema(described["components"]["schemas"]["Error"])
    for route, body in BODIES.items():
        schema = described["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
        validator = jsonschema.Draft202012Validator(schema)
        assert all("description" in field for field in schema["properties"].values())
        assert validator.is_valid(body)
        for rule_route, change, field in RULES:
            if route == rule_route and field in schema["properties"] and not validator.is_valid(body | change):
                assert client.post(route, content=json.dumps(body | change)).status_code in (400, 404)
