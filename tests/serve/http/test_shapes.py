"""Answers of a given shape: JSON, expressions, choices, and calls of tools; the parrot says what it is allowed to."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from cramjax.serve.http.answering import Service
from cramjax.serve.http.app import make_app
from cramjax.serve.http.tools import Call, Calls, Tools

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SAYS = [{"role": "user", "content": "the stack"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TEMPLATE = """
{%- if tools %}Tools:{% for tool in tools %} {{ tool.function | tojson }}{% endfor %}
A call: <tool_call>{"name": …, "arguments": …}</tool_call>
{% endif %}
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": SCHEMA}}
    for name in ("look", "fetch")
]


@pytest.fixture(scope="module")
def chatty(service_of: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server whose template has tools."""
    path: Path = tmp_path_factory.mktemp("template") / "tools.jinja"
    path.write_text(TEMPLATE, encoding="utf-8")
    with TestClient(
        make_app(service_of(chat_template=str(path), context=2048)), raise_server_exceptions=False
    ) as client:
        yield client


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


def test_what_no_token_can_go_on_with_is_given_up(client: TestClient):
    body = {"prompt": "the", "structured_outputs": {"regex": "ja"}, "bad_words": "ja"}
    (choice,) = client.post(COMPLETIONS, json=body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("j", "abort")


def test_tokens_can_be_few_and_late(client: TestClient, service: Service):
    tokenizer = service.served.model.tokenizer
    few = [*tokenizer.encode("ab"), tokenizer.separator_id]
    body = {"prompt": "the", "max_tokens": 60, "allowed_token_ids": few, "min_tokens": 9, "return_token_ids": True}
    (choice,) = client.post(COMPLETIONS, json=body).json()["choices"]
    assert set(choice["token_ids"]) <= set(few) and not {*choice["token_ids"][:9]} & {*tokenizer.ends}
    assert choice["finish_reason"] == "stop" and len(choice["token_ids"]) > 9


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "fetch"}}])
def test_a_tool_that_must_be_called_is_called_rightly(chatty: TestClient, choice: Any):
    body = {"messages": SAYS, "tools": TOOLS, "tool_choice": choice, "n": 4, "max_tokens": 900, "seed": 1}
    whole = chatty.post(CHAT, json=body).json()
    for each in whole["choices"]:
        assert each["finish_reason"] == "tool_calls" and each["message"]["content"] is None
        for call in each["message"]["tool_calls"]:
            assert call["type"] == "function" and call["id"].startswith("call_")
            assert call["function"]["name"] in (["look", "fetch"] if choice == "required" else ["fetch"])
            jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    stream = chatty.post(CHAT, json=body | {"stream": True}).text
    chunks = [json.loads(line[6:]) for line in stream.split("\n\n") if line.startswith("data: {")]
    for each in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == each["index"]]
        calls = [call for piece in pieces for call in piece["delta"].get("tool_calls", [])]
        assert [call["index"] for call in calls] == list(range(len(calls)))
        assert [call["function"] for call in calls] == [call["function"] for call in each["message"]["tool_calls"]]
        assert pieces[-1]["finish_reason"] == "tool_calls" and not "".join(
            p["delta"].get("content", "") for p in pieces
        )


def test_tools_are_told_of_and_their_answers_read(chatty: TestClient, service: Service):
    called = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"name": "<sep>"}'}}
    messages = [
        *SAYS,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "a fox"},
    ]
    told = chatty.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]
    text = service.served.model.tokenizer.decode(told)
    assert text.startswith("Tools: " + json.dumps(TOOLS[0]["function"])) and text.endswith("tool: a foxassistant:")
    assert '<tool_call>{"name": "look", "arguments": {"name": "<sep>"}}</tool_call>' in text, "its own text, as text"
    answer = chatty.post(CHAT, json={"messages": messages, "tools": TOOLS, "max_tokens": 5}).json()
    assert answer["usage"]["prompt_tokens"] == len(told) and answer["choices"][0]["message"]["content"]
    without = chatty.post(CHAT, json={"messages": messages, "tools": TOOLS, "tool_choice": "none", "max_tokens": 5})
    assert without.json()["usage"]["prompt_tokens"] < len(told)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sing"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 3}}}]} |
         {"tool_choice": "required"}, "tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]},
         "messages[0].tool_calls[0].function.arguments"),
    ],
)  # fmt: skip
def test_wrong_tools_are_errors_that_name_them(chatty: TestClient, change: dict[str, Any], field: str):
    answer = chatty.post(CHAT, json={"messages": SAYS} | change)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field, answer.text


_TEXTS = [
    ("hello <b> there", "hello <b> there", []),
    ('on <tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>', "on ", [("look", {"a": 1})]),
    (
        '<tool_call>{"name": "look"}</tool_call>\n<tool_call>{"name": "fetch", "arguments": {}}</tool_call>\n',
        "",
        [("look", {}), ("fetch", {})],
    ),
    ('<tool_call>{"name": "sing"}</tool_call>', '<tool_call>{"name": "sing"}</tool_call>', []),
    ("<tool_call>{broken</tool_call> on", "<tool_call>{broken</tool_call> on", []),
    ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    ('<tool_call>{"name": "look"}', '<tool_call>{"name": "look"}', []),
    ("a <tool_", "a <tool_", []),
]


@pytest.mark.parametrize(("text", "rest", "calls"), _TEXTS)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_calls_are_read_from_pieces_of_any_size(text: str, rest: str, calls: list[Any], size: int):
    reader = Calls(Tools([], frozenset({"look", "fetch"}), many=True, forced=None))
    read, found = "", list[Call]()
    for at in range(0, len(text), size):
        more, new = reader.add(text[at : at + size])
        read, found = read + more, [*found, *new]
    assert read + reader.rest() == rest
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls
