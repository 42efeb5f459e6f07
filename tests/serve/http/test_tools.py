"""Calls of tools in each form that models write: told, forced, read from pieces, streamed; the parrot says them."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from cramjax.data.examples import PieceEncoder, chat_template
from cramjax.errors import ConfigError
from cramjax.language_model import LanguageModel
from cramjax.serve.http.answering import Service
from cramjax.serve.http.app import make_app
from cramjax.serve.http.calls import FORMS, Call, Calls, form_of, joined

CHAT = "/v1/chat/completions"
SAYS = [{"role": "user", "content": "the stack"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"$ref": "#/$defs/age"}},
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": SCHEMA}}
    for name in ("look", "fetch")
]
_MESSAGES = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %}CALL{% endfor %}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
_TOLD = "{%- if tools %}Tools:{% for tool in tools %} {{ tool.function | tojson }}{% endfor %}\n{% endif %}"
TEMPLATES = {
    "hermes": _TOLD + _MESSAGES.replace("CALL", "<tool_call>{{ call.function | tojson }}</tool_call>"),
    "llama3": _TOLD
    + _MESSAGES.replace(
        "CALL",
        '{{ \'{"name": "\' + call.function.name + \'", "parameters": \' }}{{ call.function.arguments | tojson }}}',
    ),
    "mistral": _TOLD + _MESSAGES.replace("CALL", "[TOOL_CALLS] [{{ call.function | tojson }}]"),
}


@dataclass
class Chatty:
    client: TestClient
    service: Service
    form: str

    def says(self, text: str) -> None:
        """Let it say a text, where nothing is forced."""
        tokenizer = self.service.served.model.tokenizer
        self.service.worker.engine.speech = tokenizer.encode(text)  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=FORMS)
def chatty(
    request: pytest.FixtureRequest, service_of: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Chatty]:
    """A server whose template has tools, in each form."""
    path: Path = tmp_path_factory.mktemp("template") / "tools.jinja"
    path.write_text(TEMPLATES[request.param], encoding="utf-8")
    service = service_of(chat_template=str(path), context=2048)
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        yield Chatty(client, service, request.param)


def streamed(client: TestClient, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Choices as clients put them together: a call begins with its id and name, and its arguments are appended."""
    choices: dict[int, dict[str, Any]] = {}
    text = client.post(CHAT, json=body | {"stream": True}).text
    for line in text.split("\n\n"):
        for piece in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
            own = choices.setdefault(piece["index"], {"content": "", "calls": [], "reason": None, "pieces": 0})
            assert own["reason"] is None, "nothing comes after the reason"
            own["reason"] = piece["finish_reason"]
            own["content"] += piece["delta"].get("content") or ""
            for call in piece["delta"].get("tool_calls", []):
                own["pieces"] += 1
                if call["index"] == len(own["calls"]):
                    assert call["id"] and call["type"] == "function" and call["function"]["name"]
                    own["calls"].append(dict(call["function"]))
                else:
                    assert call["index"] == len(own["calls"]) - 1 and call.keys() == {"index", "function"}
                    assert call["function"].keys() == {"arguments"}
                    own["calls"][-1]["arguments"] += call["function"]["arguments"]
    return choices


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "fetch"}}])
def test_a_tool_that_must_be_called_is_called_rightly(chatty: Chatty, choice: Any):
    body = {"messages": SAYS, "tools": TOOLS, "tool_choice": choice, "n": 4, "max_tokens": 900, "seed": 1}
    whole = chatty.client.post(CHAT, json=body).json()
    chunks = streamed(chatty.client, body)
    for each in whole["choices"]:
        assert each["finish_reason"] == "tool_calls" and each["message"]["content"] is None
        calls = each["message"]["tool_calls"]
        for call in calls:
            assert call["type"] == "function"
            assert re.fullmatch("[0-9a-f]{9}" if chatty.form == "mistral" else "call_[0-9a-f]{24}", call["id"])
            assert call["function"]["name"] in (["look", "fetch"] if choice == "required" else ["fetch"])
            jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
        assert len(calls) == 1 or (choice == "required" and chatty.form != "llama3")
        own = chunks[each["index"]]
        assert own["calls"] == [call["function"] for call in calls] and own["content"] == ""
        assert own["reason"] == "tool_calls" and own["pieces"] > 3 * len(calls), "arguments come as they are written"
    names = {call["function"]["name"] for each in whole["choices"] for call in each["message"]["tool_calls"]}
    assert len(names) == (2 if choice == "required" else 1)


def test_a_tool_that_may_be_called_is_read(chatty: Chatty):
    arguments = '{"name": "</a>", "age": {"b": ["}", "🙂"]}}'
    key = "parameters" if chatty.form == "llama3" else "arguments"
    one = f'{{"name": "look", "{key}": {arguments}}}'
    text = {
        "hermes": f"I see.<tool_call>\n{one}\n</tool_call>\n<tool_call>\n{one}\n</tool_call>",
        "llama3": one,
        "mistral": f"I see.[TOOL_CALLS] [{one}, {one}]",
    }[chatty.form]
    body = {"messages": SAYS, "tools": TOOLS, "max_tokens": 400}
    chatty.says(text)
    (choice,) = chatty.client.post(CHAT, json=body).json()["choices"]
    calls = [call["function"] for call in choice["message"]["tool_calls"]]
    count, said = (1, None) if chatty.form == "llama3" else (2, "I see.")
    assert calls == [{"name": "look", "arguments": arguments}] * count
    assert choice["message"]["content"] == said and choice["finish_reason"] == "tool_calls"
    own = streamed(chatty.client, body)[0]
    assert (own["calls"], own["content"], own["reason"]) == (calls, said or "", "tool_calls")
    alone = chatty.client.post(CHAT, json=body | {"parallel_tool_calls": False}).json()["choices"][0]["message"]
    assert len(alone["tool_calls"]) == 1
    cut = chatty.client.post(CHAT, json=body | {"stop": ['"age"']}).json()["choices"][0]
    assert cut["message"]["tool_calls"][0]["function"]["arguments"] == '{"name": "</a>", ', "as far as it came"
    without = chatty.client.post(CHAT, json=body | {"tool_choice": "none"}).json()["choices"][0]
    assert without["message"]["content"] == text and without["finish_reason"] == "stop"


def test_tools_are_told_of_and_their_answers_read(chatty: Chatty):
    called = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"name": "<sep>"}'}}
    messages = [
        *SAYS,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "a fox"},
    ]
    told = chatty.client.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]
    text = chatty.service.served.model.tokenizer.decode(told)
    assert text.startswith("Tools: " + json.dumps(TOOLS[0]["function"])) and text.endswith("tool: a foxassistant:")
    assert '{"name": "<sep>"}' in text, "its own text, as text"
    answer = chatty.client.post(CHAT, json={"messages": messages, "tools": TOOLS, "max_tokens": 5}).json()
    assert answer["usage"]["prompt_tokens"] == len(told) and answer["choices"][0]["message"]["content"] is not None
    without = chatty.client.post(CHAT, json={"messages": messages, "tools": TOOLS, "tool_choice": "none"})
    assert without.json()["usage"]["prompt_tokens"] < len(told)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sing"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "use_beam_search": True}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"properties": {"b": {"type": 3}}}}}]}
         | {"tool_choice": "required"}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
         "tools[0].function.parameters"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]},
         "messages[0].tool_calls[0].function.arguments"),
    ],
)  # fmt: skip
def test_wrong_tools_are_errors_that_name_them(chatty: Chatty, change: dict[str, Any], field: str):
    answer = chatty.client.post(CHAT, json={"messages": SAYS} | change)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field, answer.text


def test_marks_that_are_special_tokens_are_drawn_and_read_as_such(
    spoken: LanguageModel, service_of: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mark, token = "[MASK]", spoken.tokenizer.mask_id
    assert token is not None and spoken.tokenizer.backend.id_to_token(token) == mark
    monkeypatch.setitem(FORMS, "mistral", replace(FORMS["mistral"], begin=mark))
    path = tmp_path / "tools.jinja"
    path.write_text(TEMPLATES["mistral"], encoding="utf-8")
    service = service_of(chat_template=str(path), tool_calls="mistral", context=2048)
    encode = spoken.tokenizer.encode
    service.worker.engine.speech = [*encode("so"), token, *encode('[{"name": "look"}]')]  # type: ignore[attr-defined]
    body = {"messages": SAYS, "tools": TOOLS, "max_tokens": 400, "return_token_ids": True}
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        forced = client.post(CHAT, json=body | {"tool_choice": "required", "parallel_tool_calls": False}).json()[
            "choices"
        ][0]
        assert forced["token_ids"].count(token) == 1 == len(forced["message"]["tool_calls"]), forced
        message = client.post(CHAT, json=body).json()["choices"][0]["message"]
        assert message["content"] == "so" and message["tool_calls"][0]["function"]["name"] == "look"
        plain = client.post(CHAT, json=body | {"tool_choice": "none"}).json()["choices"][0]["message"]
        assert plain["content"] == 'so[{"name": "look"}]', "where there are no tools, it is no mark"


def test_the_form_is_that_of_the_template(spoken: LanguageModel, service_of: Callable[..., Service]):
    def form(source: str) -> Any:
        return form_of(chat_template(source, PieceEncoder(spoken.tokenizer)))

    assert {name: form(source) for name, source in TEMPLATES.items()} == FORMS
    known = TEMPLATES["hermes"]
    assert form(known.replace("tools", "things")) is None, "of which it does not tell"
    assert form(known.replace("call.function | tojson", "'<function=' ~ call.function.name")) is None, "another form"
    assert form(TEMPLATES["mistral"].replace("[{{", "[ARGS]{{")) is None
    with pytest.raises(ConfigError, match="tool_calls must be auto"):
        service_of(tool_calls="mistral")


_LOOK = '{"name": "look", "arguments": {"a": 1}}'
_TEXTS = [
    ("hermes", "hello <b> there", "hello <b> there", []),
    ("hermes", f"on <tool_call>\n{_LOOK}\n</tool_call>", "on ", [("look", {"a": 1})]),
    (
        "hermes",
        '<tool_call>{"name": "look"}</tool_call>\n<tool_call>{"arguments": {}, "name": "fetch"}</tool_call>\n',
        "",
        [("look", {}), ("fetch", {})],
    ),
    ("hermes", '<tool_call>{"name": "sing"}</tool_call>', '<tool_call>{"name": "sing"}</tool_call>', []),
    ("hermes", "<tool_call>{broken</tool_call> on", "<tool_call>{broken</tool_call> on", []),
    ("hermes", "<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    ("hermes", '<tool_call>{"name": "look", "arg', '<tool_call>{"name": "look", "arg', []),
    ("hermes", f"<tool_call>{_LOOK[:-1]}</tool_call> on", " on", [("look", {"a": 1})]),  # a bracket is missing
    ("hermes", f"<tool_call>{_LOOK}\nand on", "\nand on", [("look", {"a": 1})]),  # a mark is missing
    ("hermes", f'<tool_call>{_LOOK[:-1]}, "id": "}}"}}</tool_call>', "", [("look", {"a": 1})]),
    ("hermes", "a <tool_", "a <tool_", []),
    ("llama3", " " + _LOOK.replace("arguments", "parameters"), "", [("look", {"a": 1})]),
    ("llama3", "<|python_tag|>" + _LOOK, "", [("look", {"a": 1})]),
    ("llama3", f"{_LOOK}; {_LOOK}", "", [("look", {"a": 1})] * 2),
    ("llama3", '{"a": [1, "}"]} is JSON', '{"a": [1, "}"]} is JSON', []),
    ("llama3", 'a set: {"name": "look"}', 'a set: {"name": "look"}', []),
    ("llama3", '{"type": "function", "name": "look", "parameters": {"a": "\\""}}', "", [("look", {"a": '"'})]),
    ("mistral", f"[TOOL_CALLS][{_LOOK}, {_LOOK}]", "", [("look", {"a": 1})] * 2),
    ("mistral", f"so [TOOL_CALLS] [ {_LOOK} ] on", "so  on", [("look", {"a": 1})]),
    ("mistral", "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    ("mistral", '[TOOL_CALLS] [{"name": "sing"}]', '[TOOL_CALLS] [{"name": "sing"}]', []),
]


@pytest.mark.parametrize(("form", "text", "rest", "calls"), _TEXTS)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_calls_are_read_from_pieces_of_any_size(form: str, text: str, rest: str, calls: list[Any], size: int):
    reader = Calls(FORMS[form], {"look", "fetch"}, many=True)
    read, found = "", list[Call]()
    for at in range(0, len(text), size):
        more, new = reader.add(text[at : at + size])
        read, found = read + more, [*found, *new]
    assert read + reader.rest() == rest
    assert [(call.name, json.loads(call.arguments)) for call in joined(found)] == calls
