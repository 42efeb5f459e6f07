"""What is answered: whole and as a stream, with a parrot for an engine, which says a text that is known."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from cramjax.language_model import LanguageModel

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SPEECH = "the stack 🙂 walks block by block, café. 👩‍👩‍👧 every token pays for its own place. "  # as in conftest.py
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "the "},
    CHAT: {"messages": [{"role": "user", "content": "the stack"}]},
}


def events(client: TestClient, route: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, of which the last line says that it is over."""
    answer = client.post(route, json=body | {"stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    *lines, last, empty = answer.text.split("\n\n")
    assert (last, empty) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def joined(chunks: list[dict[str, Any]], chat: bool) -> dict[int, dict[str, Any]]:
    """Choices as an answer in one has them, from the chunks of a stream, as clients put them together."""
    choices: dict[int, dict[str, Any]] = {}
    for piece in (choice for chunk in chunks for choice in chunk["choices"]):
        own = choices.setdefault(piece["index"], {"text": "", "logprobs": [], "finish_reason": None})
        assert own["finish_reason"] is None, "nothing comes after the reason"
        own["finish_reason"] = piece["finish_reason"]
        own["text"] += piece["delta"].get("content", "") if chat else piece["text"]
        own["logprobs"].append(piece["logprobs"])
    for own in choices.values():
        given = [logprobs for logprobs in own["logprobs"] if logprobs]
        keys = dict.fromkeys(key for logprobs in given for key in logprobs)
        own["logprobs"] = {key: [each for logprobs in given for each in logprobs[key]] for key in keys} or None
    return choices


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "asked",
    [
        {"max_tokens": 60},
        {"max_tokens": 7},
        {"max_tokens": 9},
        {"max_tokens": 200, "n": 3},
        {"max_tokens": 60, "stop": ["café"]},
        {"max_tokens": 60, "stop": ["é", "y blo"], "include_stop_str_in_output": True},
        {"max_tokens": 60, "stop": "🙂"},
        {"max_tokens": 60, "stop": ["👩‍👩‍👧 every tokens", "nowhere"], "logprobs": True},
        {"max_tokens": 200, "logprobs": True, "skip_special_tokens": False},
        {"max_tokens": 20, "echo": True, "logprobs": True},
    ],
    ids=str,
)
def test_a_stream_is_the_whole_in_pieces(client: TestClient, route: str, asked: dict[str, Any]):
    if route == COMPLETIONS and "logprobs" in asked:
        asked = asked | {"logprobs": 2}
    if route == CHAT:
        asked = {name: value for name, value in asked.items() if name != "echo"}
    body = BODIES[route] | asked
    whole = client.post(route, json=body).json()
    streamed = joined(events(client, route, body), chat=route == CHAT)
    assert [choice["index"] for choice in whole["choices"]] == sorted(streamed) == list(range(asked.get("n", 1)))
    for choice in whole["choices"]:
        own = streamed[choice["index"]]
        text = choice["message"]["content"] if route == CHAT else choice["text"]
        assert own["text"].encode() == text.encode() and "\ufffd" not in text.rstrip("\ufffd")
        assert (own["logprobs"], own["finish_reason"]) == (choice["logprobs"], choice["finish_reason"])


_PARTS = st.builds(lambda at, long: SPEECH[at : at + long], st.integers(0, len(SPEECH) - 1), st.integers(1, 6))


@given(stops=st.lists(_PARTS, max_size=3), most=st.integers(1, 80), keep=st.booleans(), echo=st.booleans())
@settings(max_examples=40, deadline=None)
def test_wherever_it_is_cut_text_and_offsets_are_those_of_the_tokens(
    client: TestClient, spoken: LanguageModel, stops: list[str], most: int, keep: bool, echo: bool
):
    """Against decoding all at once, and looking for stop strings in the whole."""
    asked = {"max_tokens": most, "stop": stops, "include_stop_str_in_output": keep, "echo": echo, "logprobs": 1}
    body = {"prompt": "the ", "return_token_ids": True} | asked
    (whole,) = client.post(COMPLETIONS, json=body).json()["choices"]
    ids = spoken.tokenizer.encode(SPEECH)[:most]
    text = spoken.tokenizer.decode(ids)
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    end, begin = min(ends, default=(len(text), len(text)))
    shown = "the " if echo else ""
    assert whole["text"] == shown + text[: end if keep else begin]
    drawn = whole["token_ids"]
    assert ids[: len(drawn)] == [token for token in drawn if token != spoken.tokenizer.separator_id]
    offsets = [len(shown + spoken.tokenizer.decode(drawn[:n]).rstrip("\ufffd")) for n in range(len(drawn))]
    assert whole["logprobs"]["text_offset"][-len(drawn) :] == offsets
    streamed = joined(events(client, COMPLETIONS, body), chat=False)[0]
    assert streamed["text"].encode() == whole["text"].encode()
    assert (streamed["logprobs"], streamed["finish_reason"]) == (whole["logprobs"], whole["finish_reason"])


def test_the_text_is_what_the_engine_drew_up_to_the_stop(client: TestClient):
    def answer(**asked: Any) -> tuple[str, str, int]:
        found = client.post(COMPLETIONS, json={"prompt": "the ", "max_tokens": 200} | asked).json()
        choice = found["choices"][0]
        return choice["text"], choice["finish_reason"], found["usage"]["completion_tokens"]

    whole, reason, tokens = answer()
    assert (whole, reason) == (SPEECH, "stop")
    assert answer(max_tokens=5)[1:] == ("length", 5)
    text, reason, fewer = answer(stop=[" block", "café"])
    assert (text, reason) == (SPEECH[: SPEECH.index(" block")], "stop") and fewer < tokens
    assert answer(stop=["café"], include_stop_str_in_output=True)[0] == SPEECH[: SPEECH.index("café") + 4]
    assert answer(echo=True)[0] == "the " + SPEECH
    assert answer(skip_special_tokens=False)[0] == SPEECH + "<sep>"
    # 200 tokens that do not end: the separator again and again, of which nothing is shown.
    assert answer(ignore_eos=True) == (SPEECH, "length", 200)


def test_what_is_cut_off_a_prompt_is_not_echoed(client: TestClient, spoken: LanguageModel):
    asked = {"prompt": "the stack walks block", "truncate_prompt_tokens": 2, "max_tokens": 1}
    body = asked | {"echo": True, "logprobs": 1, "return_token_ids": True}
    found = client.post(COMPLETIONS, json=body).json()["choices"][0]
    kept = spoken.tokenizer.encode(asked["prompt"])[-2:]
    names, text = found["logprobs"]["tokens"], found["text"]
    assert found["prompt_token_ids"] == kept and text == "".join(names) and len(names) == 3
    assert text.startswith(spoken.tokenizer.decode(kept)) and found["logprobs"]["text_offset"][0] == 0
    assert all(text[at:].startswith(name) for at, name in zip(found["logprobs"]["text_offset"], names, strict=True))


def test_log_probabilities_have_tokens_offsets_and_likeliest_ones(client: TestClient, spoken: LanguageModel):
    ids = spoken.tokenizer.encode("the stack")
    body = {"prompt": ids, "max_tokens": 2, "echo": True, "logprobs": 3}
    found = client.post(COMPLETIONS, json=body).json()["choices"][0]
    text, logprobs = found["text"], found["logprobs"]
    assert len(logprobs["tokens"]) == len(ids) + 2 and "".join(logprobs["tokens"]) == text
    assert [text[at:].startswith(token) for at, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1 : len(ids)] == [-token / 100 for token in ids[1:]]
    assert all(len(top) in (3, 4) for top in logprobs["top_logprobs"][1:])
    named = client.post(COMPLETIONS, json=body | {"return_tokens_as_token_ids": True}).json()["choices"][0]["logprobs"]
    assert named["tokens"][: len(ids)] == [f"token_id:{token}" for token in ids]
    assert named["token_logprobs"] == logprobs["token_logprobs"]
    chat = client.post(CHAT, json=BODIES[CHAT] | {"max_tokens": 40, "logprobs": True, "top_logprobs": 2}).json()
    content = chat["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(each["bytes"]) for each in content).decode("utf-8", "ignore").startswith("the stack 🙂 walks")
    assert all(len(each["top_logprobs"]) == 2 for each in content)


def test_prompt_alone_is_scored_without_a_token_drawn(client: TestClient):
    body = {"prompt": ["the", "stack walks"], "max_tokens": 0, "echo": True, "logprobs": 1}
    found = client.post(COMPLETIONS, json=body).json()
    assert [choice["text"] for choice in found["choices"]] == body["prompt"]
    assert found["usage"]["completion_tokens"] == 0
    scored = client.post(COMPLETIONS, json={"prompt": "the stack", "max_tokens": 1, "prompt_logprobs": 1}).json()
    first, *others = scored["choices"][0]["prompt_logprobs"]
    assert first is None and all(1 <= len(each) <= 2 for each in others)


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_usage_comes_last_or_in_every_chunk(client: TestClient, route: str):
    body = BODIES[route] | {"max_tokens": 4, "n": 2}
    usage = client.post(route, json=body).json()["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == usage["prompt_tokens"] + 8
    *chunks, last = events(client, route, body | {"stream_options": {"include_usage": True}})
    assert last["choices"] == [] and last["usage"] == usage and all("usage" not in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    continuous = events(client, route, body | {"stream_options": {"continuous_usage_stats": True}})
    assert continuous[-1]["usage"] == usage


def test_tokens_and_texts_are_each_others(client: TestClient, spoken: LanguageModel):
    text = "the stack 🙂"
    found = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    ids = spoken.tokenizer.encode(text)
    assert found["tokens"] == [*spoken.tokenizer.opening(ids), *ids] and found["count"] == len(ids) + 1
    assert len(found["token_strs"]) == found["count"] and found["max_model_len"] == 256
    plain = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert plain == ids and client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    end = client.get("/tokenizer_info").json()["eos_token"]
    asked = client.post("/tokenize", json={"prompt": end, "add_special_tokens": False}).json()["tokens"]
    assert asked == [spoken.tokenizer.separator_id]
    chat = client.post("/tokenize", json={"messages": BODIES[CHAT]["messages"]}).json()["tokens"]
    assert spoken.tokenizer.decode(chat) == "User:\nthe stack\n\nAssistant:\n"
    usage = client.post(CHAT, json=BODIES[CHAT] | {"max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == len(chat)


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"truncate_prompt_tokens": 2}, slice(-2, None)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, slice(3)),
        ({"truncate_prompt_tokens": -1}, slice(-250, None)),  # of 256 that the model sees, with 6 drawn
    ],
)
def test_prompts_that_are_too_long_are_cut(client: TestClient, asked: dict[str, Any], kept: slice):
    ids = [5 + n % 200 for n in range(300)]
    body = {"prompt": ids, "max_tokens": 6, "return_token_ids": True}
    (choice,) = client.post(COMPLETIONS, json=body | asked).json()["choices"]
    assert choice["prompt_token_ids"] == ids[kept]


def test_models_health_metrics_and_page(client: TestClient):
    card = client.get("/v1/models").json()["data"][0]
    assert card["id"] == "parrot" and client.get("/v1/models/parrot").json() == card
    for answer in (client.get("/health"), client.get("/ping"), client.post("/ping")):
        assert answer.json() == {"status": "ok"}
    assert client.get("/load").json() == {"server_load": 0} and client.get("/version").json()["version"]
    client.post(COMPLETIONS, json={"prompt": "the", "max_tokens": 3})
    metrics = client.get("/metrics").text
    for name in ("num_requests_running", "generation_tokens_total", "time_to_first_token_seconds_bucket"):
        assert re.search(rf'^cramjax:{name}{{.*model_name="parrot".*}} \d', metrics, re.MULTILINE), name
    assert 'finished_reason="length"' in metrics
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "default-src 'none'" in str(page.headers)
    assert not re.search(r"(src|href)=|url\(|https?:", page.text), "nothing comes from elsewhere"


def test_what_the_page_asks_for_is_served(client: TestClient):
    page = client.get("/").text
    routes = set(re.findall(r'"(/v1/[a-z/]+)"', page))
    assert routes == {COMPLETIONS, CHAT, "/v1/models"}
    asked = re.search(r"const asked = \{model, stream: true, stream_options: \{include_usage: true\},", page)
    assert asked, "as below"
    common = {"model": "parrot", "stream_options": {"include_usage": True}, "max_tokens": 8, "temperature": 0.8}
    for route, wants in ((COMPLETIONS, {"logprobs": 5}), (CHAT, {"logprobs": True, "top_logprobs": 5})):
        *chunks, last = events(client, route, BODIES[route] | common | wants)
        assert last["usage"]["completion_tokens"] == 8
        scored = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
        assert sum(len(each["content"] if route == CHAT else each["tokens"]) for each in scored) == 8
