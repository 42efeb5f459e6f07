"""What a chat's prompt is made of: whose turn begins or goes on, and what else the template reads."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cramjax.serve.http.answering import Service
from cramjax.serve.http.app import make_app

Told = Callable[..., tuple[str, int]]

CHAT = "/v1/chat/completions"
ASKS = {"role": "user", "content": "is it 🙂 <sep>?"}
SAYS = {"role": "assistant", "content": "It is <sep>, "}
TEMPLATE = """
{%- if documents %}{% for each in documents %}{{ each.title }}: {{ each.text }};{% endfor %}{% endif %}
{%- if reasoning_effort %}({{ reasoning_effort }}){% endif %}{% if shout %}!{% endif %}
{%- for message in messages %}[{{ message.role }}] {{ message.content | trim }}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}[assistant] {% endif %}"""


@pytest.fixture(scope="module")
def told(service_of: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """The prompt that a body makes, and turns that have ended in it, with a template that reads more than messages."""
    path: Path = tmp_path_factory.mktemp("template") / "more.jinja"
    path.write_text(TEMPLATE, encoding="utf-8")
    service = service_of(chat_template=str(path))
    tokenizer = service.served.model.tokenizer
    with TestClient(make_app(service), raise_server_exceptions=False) as client:

        def tell(**body: Any) -> tuple[str, int]:
            answer = client.post("/tokenize", json=body)
            assert answer.status_code == 200, answer.text
            tokens = answer.json()["tokens"]
            used = client.post(CHAT, json=body | {"max_tokens": 1}).json()["usage"]["prompt_tokens"]
            assert used == len(tokens), "a chat's prompt is what is tokenized"
            return tokenizer.decode(tokens, special=True), tokens.count(tokenizer.separator_id)

        yield tell


def test_a_turn_begins_goes_on_or_neither(told: Told):
    asked = "[user] is it 🙂 <sep>?<sep>"  # of which the second ends the turn, and the first is what was said
    assert told(messages=[ASKS]) == (f"{asked}[assistant] ", 1)
    assert told(messages=[ASKS], add_generation_prompt=True) == (f"{asked}[assistant] ", 1)
    assert told(messages=[ASKS], add_generation_prompt=False) == (asked, 1)
    assert told(messages=[ASKS, SAYS]) == (f"{asked}[assistant] It is <sep>,<sep>[assistant] ", 2)
    for body in ({}, {"add_generation_prompt": False}):
        goes_on = told(messages=[ASKS, SAYS], continue_final_message=True, **body)
        assert goes_on == (f"{asked}[assistant] It is <sep>, ", 1), "with the space that it ends in"


def test_what_else_the_template_reads(told: Told):
    documents = [{"title": "fox", "text": "<sep> red"}, {"title": "crow", "text": "black"}]
    text, ends = told(messages=[ASKS], documents=documents, reasoning_effort="low")
    assert text.startswith("fox: <sep> red;crow: black;(low)[user]") and ends == 1
    assert told(messages=[ASKS], chat_template_kwargs={"shout": True})[0].startswith("![user]")
    assert told(messages=[ASKS], documents=[]) == told(messages=[ASKS])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"messages": [ASKS], "continue_final_message": True}, "continue_final_message"),
        ({"messages": [ASKS, SAYS], "continue_final_message": True, "add_generation_prompt": True}, None),
        ({"documents": [{"title": "a", "text": "b"}]}, "documents"),
        ({"documents": "a"}, "documents"),
        ({"documents": [{"text": 3}]}, "documents"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"reasoning_effort": "very"}, "reasoning_effort"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": {"documents": []}}, "chat_template_kwargs"),
    ],
)
def test_what_this_template_does_not_read_is_refused(client: TestClient, change: dict[str, Any], field: str | None):
    answer = client.post(CHAT, json={"messages": [ASKS]} | change)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == (field or "continue_final_message")
