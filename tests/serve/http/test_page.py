"""The page at /, used in a real browser as somebody would: completing, chatting, stopping, making mistakes."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from cramjax.serve.http.answering import Service

from .browser import Browser, browser
from .conftest import listening

SPEECH = "the stack 🙂 walks block by block, café. 👩‍👩‍👧 every token pays for its own place. "  # as in conftest.py


@dataclass
class Shown:
    page: Browser
    parrot: Any


@pytest.fixture(scope="module")
def shown(service_of: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """The page of a parrot, in a browser."""
    service = service_of(seconds=0.002)
    with browser(tmp_path_factory.mktemp("profile")) as page, listening(service) as url:
        page.call("Page.navigate", url=f"{url}/")
        page.until("document.getElementById('name')?.textContent === 'parrot'")
        yield Shown(page, service.worker.engine)


def answer(page: Browser, prompt: str) -> str:
    """What is shown once an answer to a prompt is there."""
    page.write("prompt", prompt)
    page.click("send")
    page.until("document.getElementById('speed').textContent.includes('tokens/s')")
    assert not page.value("document.getElementById('error').textContent")
    return page.value("document.getElementById('answer').textContent")


def test_a_text_is_completed_and_its_speed_shown(shown: Shown):
    page = shown.page
    page.write("max", "200")
    assert answer(page, "Once ") == "Once " + SPEECH
    speed = page.value("document.getElementById('speed').textContent")
    found = re.fullmatch(r"(\d+) tokens, ([\d.]+) tokens/s, first after ([\d.]+) s", speed)
    assert found and int(found[1]) > 30 and float(found[2]) > 0
    assert page.mistakes == []


def test_log_probabilities_are_shown_of_each_token(shown: Shown):
    page = shown.page
    page.click("clear")
    page.write("max", "8")
    page.click("logprobs")
    text = answer(page, "Once ")
    tokens = page.value("[...document.querySelectorAll('#answer .token')].map(t => [t.textContent, t.title])")
    assert len(tokens) == 8 and "".join(token for token, _ in tokens) == text.removeprefix("Once ")
    for _, title in tokens:
        own, *others = title.split("\n")
        assert 0 <= float(own) <= 1 and len(others) >= 5 and all(re.search(r'^".*" \d\.\d+$', one) for one in others)
    colours = page.value("[...document.querySelectorAll('#answer .token')].map(t => t.style.borderColor)")
    assert len(set(colours)) > 1, "likely and unlikely tokens look different"
    page.click("logprobs")
    assert page.mistakes == []


def test_a_chat_goes_on_and_can_be_cleared(shown: Shown):
    page = shown.page
    page.value("document.getElementById('mode').value = 'chat'")
    page.value("document.getElementById('mode').onchange()")
    page.write("max", "6")
    first = answer(page, "hello")
    assert first.startswith("hello" + SPEECH[:5])
    second = answer(page, "again")
    assert second.startswith(first + "again" + SPEECH[:5])
    assert page.value("turns.map(turn => turn.role)") == ["user", "assistant"] * 2
    page.click("clear")
    assert page.value("document.getElementById('answer').textContent") == "" and page.value("turns.length") == 0
    page.value("document.getElementById('mode').value = 'complete'")
    page.value("document.getElementById('mode').onchange()")
    assert page.mistakes == []


def test_an_answer_can_be_stopped(shown: Shown):
    page, parrot = shown.page, shown.parrot
    page.write("max", "200")
    parrot.seconds, before = 0.3, len(parrot.cancelled)  # so that there is time to stop it, on slow machines too
    page.write("prompt", "Once ")
    page.click("send")
    page.until("document.getElementById('answer').textContent.length > 8")
    page.click("stop")
    page.until("!document.getElementById('send').disabled")
    parrot.seconds = 0.002
    end = time.monotonic() + 60
    while len(parrot.cancelled) == before:
        assert time.monotonic() < end, "the engine was not told"
        time.sleep(0.01)
    text = page.value("document.getElementById('answer').textContent")
    assert text.startswith("Once the") and len(text) < len(SPEECH)
    assert page.mistakes == []


def test_a_mistake_is_told(shown: Shown):
    page = shown.page
    page.write("max", "100000")
    page.write("prompt", "Once ")
    page.click("send")
    assert "this model sees 256 tokens" in page.until("document.getElementById('error').textContent")
    page.mistakes.clear()  # browsers log answers of 400
    page.write("max", "4")
    assert answer(page, "<b>Once</b> & ").startswith("<b>Once</b> & the"), "what is said is text"
