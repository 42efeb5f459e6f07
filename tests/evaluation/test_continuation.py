"""Continuations up to texts that stop them, against the whole continuation cut at the first of these."""

from dataclasses import replace
from typing import Any

import pytest

from cramjax.errors import ConfigError
from cramjax.evaluation.continuation import continuations, cut
from cramjax.language_model import LanguageModel
from cramjax.serve import generate
from cramjax.serve.generate import continue_rows

PROMPTS = ["The author", "The pilot near the", "A", "the kings that"]


def prompts_of(model: LanguageModel) -> list[list[int]]:
    return [[model.tokenizer.separator_id, *model.tokenizer.encode(prompt)] for prompt in PROMPTS]


def test_continuations_end_where_a_text_stops_them(causal: LanguageModel):
    """The batch goes on until each of its rows is stopped; what a row has too much is cut."""
    whole = [each.text for each in generate(causal, PROMPTS, max_tokens=40, temperature=0.0)]
    stop = [whole[0][30:32], whole[1][3:5]]
    found = continuations(causal, prompts_of(causal), max_tokens=40, stop=stop)
    for text, own in zip(found, whole, strict=True):
        assert text == own[: min((own.find(end) for end in stop if end in own), default=len(own))]
    assert continuations(causal, prompts_of(causal), max_tokens=40) == whole


def test_no_more_is_drawn_than_is_looked_at(causal: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    rows: list[int] = []

    def watched(model: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        before = [len(row) for row in batch]
        continue_rows(model, batch, *args, **kwargs)
        rows.extend(len(row) - start for row, start in zip(batch, before, strict=True))

    monkeypatch.setattr("cramjax.evaluation.continuation.continue_rows", watched)
    whole = generate(causal, PROMPTS, max_tokens=40, temperature=0.0)
    continuations(causal, prompts_of(causal), max_tokens=40, stop=[each.text[:2] for each in whole])
    assert len(rows) == 4 and max(rows) <= 17  # a token with the prompt, and 16 in a call


def test_small_batches_give_the_same(causal: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    whole = continuations(causal, prompts_of(causal), max_tokens=40)
    monkeypatch.setattr("cramjax.evaluation.continuation._MOST_ROWS", 2)
    seen: list[tuple[int, int]] = []
    parts = continuations(causal, prompts_of(causal), max_tokens=40, progress=lambda *done: seen.append(done))
    assert parts == whole and seen == [(2, 4), (4, 4)]


def test_long_prompts_lose_their_start_but_not_what_stands_before_every_text(causal: LanguageModel):
    prompt = [0, *range(10, 90)]
    assert cut(causal, prompt, 20) == prompt[-44:]
    begun = replace(causal, tokenizer=replace(causal.tokenizer, begin_ids=(0,)))
    assert cut(begun, prompt, 20) == [0, *prompt[-43:]]
    short = prompt[:30]
    assert cut(causal, short, 20) is short


def test_room_for_a_prompt_is_needed(causal: LanguageModel):
    with pytest.raises(ConfigError, match="max_tokens must be from 1 to 63, for a-model sees 64 tokens; got 64"):
        continuations(causal, [[1]], max_tokens=64)
