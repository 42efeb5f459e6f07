"""Beam search against all continuations there are, and against its definition over whole vocabularies."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from cramjax import cli
from cramjax.config import ModelConfig
from cramjax.data import Tokenizer
from cramjax.errors import ConfigError
from cramjax.language_model import LanguageModel
from cramjax.model import make_model
from cramjax.serve import BeamSearch, beam_search
from cramjax.serve.beam import Hypothesis, search_tokens

LETTERS = ("<end>", "<pad>", "a", "b", "c", "d", "e")
PROMPT = (2, 3, 4)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Of seven tokens, one of which ends a text and one of which is never drawn."""
    backend = tokenizers.Tokenizer(models.WordLevel(dict(zip(LETTERS, range(7), strict=True)), unk_token="e"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<end>", "<pad>"])
    tokenizer = Tokenizer(backend, separator_id=0, mask_id=None, pad_id=1)
    config = ModelConfig(layers=2, width=32, heads=2, mlp=64, init_std=0.3, tied=True)
    built = make_model(config, vocab_size=7, sequence_length=16, causal=True, separator_id=0)
    return LanguageModel(Path("a-model"), "causal", tokenizer, 16, built, built.init(jax.random.key(4)))


def log_probabilities(model: LanguageModel, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Of the tokens after each of some texts of one length, by the whole forward pass; <pad> is not drawn."""
    hidden = model.model.hidden(model.params, jnp.asarray(texts, jnp.int32))[:, -1]
    logits = np.asarray(model.model.logits(model.params, hidden), np.float64)
    values = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    values[:, 1] = -np.inf
    return values


def all_texts(model: LanguageModel, longest: int) -> dict[tuple[int, ...], float]:
    """Every continuation that ends or is so long, with its log-probability."""
    found: dict[tuple[int, ...], float] = {}
    going: dict[tuple[int, ...], float] = {(): 0.0}
    for length in range(1, longest + 1):
        each = log_probabilities(model, [[*PROMPT, *text] for text in going])
        after = {}
        for (text, total), row in zip(going.items(), each, strict=True):
            for token in (0, 2, 3, 4, 5, 6):
                place = found if token == 0 or length == longest else after
                place[(*text, token)] = total + row[token]
        going = after
    return found


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0, -0.5])
def test_with_beams_enough_it_is_exhaustive(model: LanguageModel, penalty: float) -> None:
    every = all_texts(model, 3)
    best = sorted(every, key=lambda text: -every[text] / len(text) ** penalty)[:5]
    found = search_tokens(model, PROMPT, BeamSearch(36, penalty), 3)
    assert [each.tokens for each in found[:5]] == best
    for each in found:
        assert each.log_probability == pytest.approx(every[each.tokens], abs=1e-4)
        assert each.score == pytest.approx(every[each.tokens] / len(each.tokens) ** penalty, abs=1e-4)
        assert each.ended == (each.tokens[-1] == 0)


def by_definition(model: LanguageModel, search: BeamSearch, longest: int) -> list[tuple[int, ...]]:
    """One group after the other in each step, every token of the vocabulary looked at, no early end."""
    size = search.beams // search.groups
    groups = [[((), 0.0)] for _ in range(search.groups)]
    ended: list[list[tuple[float, tuple[int, ...]]]] = [[] for _ in groups]

    def score(text: tuple[int, ...], total: float) -> float:
        return total / len(text) ** search.length_penalty

    for _ in range(longest):
        taken: list[int] = []
        for number, beams in enumerate(groups):
            each = log_probabilities(model, [[*PROMPT, *text] for text, _ in beams])
            continued = [
                (total + row[token] - search.diversity * taken.count(token), total + row[token], (*text, token))
                for (text, total), row in zip(beams, each, strict=True)
                for token in (0, 2, 3, 4, 5, 6)
            ]
            continued.sort(key=lambda one: -one[0])
            ended[number] += [(score(text, total), text) for _, total, text in continued[:size] if text[-1] == 0]
            groups[number] = [(text, total) for _, total, text in continued if text[-1] != 0][:size]
            taken += [text[-1] for text, _ in groups[number]]
    for own, beams in zip(ended, groups, strict=True):
        own += [(score(text, total), text) for text, total in beams]
    best = itertools.chain.from_iterable(sorted(own, reverse=True)[:size] for own in ended)
    return [text for _, text in sorted(best, reverse=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "search",
    [BeamSearch(1), BeamSearch(4, 0.0), BeamSearch(6, 1.0, 3, 1.5)],
    ids=str,
)
def test_beams_are_those_of_the_definition(model: LanguageModel, search: BeamSearch) -> None:
    found = search_tokens(model, PROMPT, search, 6)
    assert [each.tokens for each in found] == by_definition(model, search, 6)


def test_diversity_keeps_groups_apart(model: LanguageModel) -> None:
    alike = search_tokens(model, PROMPT, BeamSearch(4, groups=4), 4)
    apart = search_tokens(model, PROMPT, BeamSearch(4, groups=4, diversity=50.0), 4)
    assert len({each.tokens for each in alike}) == 1
    assert len({each.tokens[0] for each in apart}) == 4


def test_texts_and_their_order(model: LanguageModel) -> None:
    (found,) = beam_search(model, "a b c", BeamSearch(4), max_tokens=5)
    assert all(isinstance(each, Hypothesis) and "<end>" not in each.text for each in found)
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    both = beam_search(model, ["a b c", "d"], BeamSearch(4), max_tokens=5)
    assert both[0] == found and len(both) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams must be 1 or more, got 0"),
        ({"beams": 4, "groups": 3}, "groups must be a divisor of beams, got 3"),
        ({"diversity": 0.5}, "diversity is between groups, got 0.5 and one group"),
        ({"length_penalty": float("inf")}, "length_penalty must be finite, got inf"),
    ],
)
def test_what_cannot_be_is_one_sentence(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BeamSearch(**options)


def test_a_prompt_must_leave_room(model: LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"at most 16 tokens together \(the context\), got 4 and 13"):
        beam_search(model, "a b c", max_tokens=13)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--beams", "2", "--top_k", "3"], "--beams draws nothing, and --top_k says how to"),
        (["--length_penalty", "2"], "--length_penalty is of a search: give --beams too"),
    ],
)
def test_options_that_exclude_each_other(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "nothing", "text", *words]) == 2
    assert message in capsys.readouterr().err
