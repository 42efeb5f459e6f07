"""Tokens that obey: whatever a model with random weights says under a constraint is what was asked for."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cramjax.config import TokenizerConfig
from cramjax.data.tokenizer import train_tokenizer
from cramjax.errors import ConfigError
from cramjax.language_model import LanguageModel
from cramjax.serve import generate
from cramjax.serve.constraints import Both, Grammars, TokenLimits, _Grammar, words_of
from cramjax.serve.engine import Engine
from cramjax.serve.request import Constraint, Progress, Request, SamplingParameters
from cramjax.serving import EngineConfig

pytest.importorskip("llguidance", reason="needs the `serve` extra")

CONTEXT = 512


@pytest.fixture(scope="module")
def model(run_of: Callable[..., Any]) -> LanguageModel:
    return run_of(sequence_length=CONTEXT, kv_heads=1).language_model


@pytest.fixture(scope="module")
def engine(model: LanguageModel) -> Engine:
    return Engine(model, EngineConfig(slots=2, lookup=3))


@pytest.fixture(scope="module")
def grammars(model: LanguageModel) -> Grammars:
    return Grammars(model.tokenizer)


def answers(
    engine: Engine, constraints: Sequence[Constraint | None], seed: int = 0, tokens: int = CONTEXT - 8
) -> list[tuple[list[int], str | None]]:
    """The tokens and the reason of one request for each constraint, all at once."""
    got: list[list[Progress]] = [[] for _ in constraints]
    for number, (own, constraint) in enumerate(zip(got, constraints, strict=True)):
        sampling = SamplingParameters(temperature=1.0, seed=seed + number)
        engine.add(Request((5, 6, 7), tokens, sampling, constraint=constraint), own.append)
    while engine.step():
        pass
    return [([token for each in own for token in each.tokens], own[-1].reason) for own in got]


def text(model: LanguageModel, tokens: Sequence[int]) -> str:
    """The bytes of tokens as a text, without the token that ends it."""
    return b"".join(model.tokenizer.token_bytes(t) for t in tokens if t not in model.tokenizer.ends).decode()


_SCALARS = st.sampled_from(
    [
        {"type": "string", "maxLength": 6},
        {"type": "string", "pattern": "^[a-c]{1,3}🙂$"},
        {"type": "string", "format": "date"},
        {"type": "integer", "minimum": -20, "maximum": 300},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["ä", 3, None, "x y"]},
        {"const": {"a": [1]}},
    ]
)
_NAMES = st.text('ab "é', min_size=1, max_size=3)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def made(properties: dict[str, Any]) -> dict[str, Any]:
        required = sorted(properties)[::2]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.dictionaries(_NAMES, inner, min_size=1, max_size=3).map(made)


def _wider(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Objects, lists and alternatives of schemas, and these themselves."""
    lists = inner.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2})
    either = st.lists(inner, min_size=2, max_size=2).map(lambda some: {"anyOf": some})
    return st.one_of(inner, _objects(inner), lists, either)


SCHEMAS = _wider(_wider(_SCALARS))


@pytest.mark.slow
@given(schemas=st.lists(SCHEMAS, min_size=1, max_size=3), seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_answer_is_json_of_its_schema(
    model: LanguageModel, engine: Engine, grammars: Grammars, schemas: list[dict[str, Any]], seed: int
):
    """Beside one that may say anything, and in an engine that guesses tokens."""
    found = answers(engine, [None, *(grammars.constraint("json", schema) for schema in schemas)], seed)
    for schema, (tokens, reason) in zip(schemas, found[1:], strict=True):
        said = text(model, tokens)
        assert reason == "stop", said
        jsonschema.validate(json.loads(said), schema)


def test_texts_are_of_their_expression_choice_or_grammar(model: LanguageModel, engine: Engine, grammars: Grammars):
    asked: list[tuple[Any, Any, str]] = [
        ("regex", r"[0-9]{3}-(a|b|🙂)+!", r"[0-9]{3}-(a|b|🙂)+!"),
        ("choice", ["yes\n", 'n"o', "ça va"], 'yes\n|n"o|ça va'),
        ("grammar", 'start: "(" inner ")"\ninner: "x" | "(" inner ")"', r"\(+x\)+"),
    ]
    for seed in range(4):
        found = answers(engine, [grammars.constraint(kind, what) for kind, what, _ in asked], seed)
        for (_, _, expression), (tokens, reason) in zip(asked, found, strict=True):
            assert re.fullmatch(expression, text(model, tokens)) and reason == "stop"


@pytest.mark.slow
def test_a_choice_is_as_likely_as_the_model_has_it(model: LanguageModel, engine: Engine, grammars: Grammars):
    """What a mask leaves is drawn by the model's own probabilities."""
    letters = [model.tokenizer.encode(letter)[0] for letter in "abcd"]
    choices = [grammars.constraint("choice", list("abcd")) for _ in range(80)]
    draws = [tokens[0] for tokens, _ in answers(engine, choices)]
    counts = np.array([draws.count(letter) for letter in letters])
    assert counts.sum() == 80, "nothing else is drawn"
    logits = model.model.logits(model.params, model.model.hidden(model.params, jnp.int32([[5, 6, 7]])))[0, -1]
    likely = np.exp(np.asarray(logits, np.float64)[letters])
    expected = 80 * likely / likely.sum()
    chi = float(((counts - expected) ** 2 / np.maximum(expected, 1)).sum())
    assert chi < 21.1, (counts, expected)  # 3 degrees of freedom: 1 in 10,000


def test_tokens_that_are_not_allowed_are_not_drawn(model: LanguageModel, engine: Engine):
    vocab = model.model.vocab_size
    only = [10, 31, 32, 63, 64, 250]
    limits = [
        TokenLimits(vocab, allowed=only),
        TokenLimits(vocab, allowed=[10, 31], never=[[31]]),
        TokenLimits(vocab, allowed=[31, 32], never=[[31, 31], [32, 32, 32]]),
        TokenLimits(vocab, allowed=[31, 32], late=[32], first=5),
    ]
    one, two, three, four = (tokens for tokens, _ in answers(engine, limits, tokens=40))
    assert set(one) <= set(only) and len(set(one)) > 2
    assert set(two) == {10}
    assert (31, 31) not in zip(three, three[1:], strict=False) and 31 in three
    assert (32, 32, 32) not in zip(three, three[1:], three[2:], strict=False)
    assert four[:5] == [31] * 5 and 32 in four[5:]


def test_both_is_what_both_allow(model: LanguageModel, engine: Engine, grammars: Grammars):
    number = grammars.constraint("regex", "[0-9]{4}")
    seven = model.tokenizer.encode("7")
    ((tokens, reason),) = answers(engine, [Both(number, TokenLimits(model.model.vocab_size, allowed=seven))])
    assert (text(model, tokens), reason) == ("7777", "stop")


def test_what_no_token_satisfies_ends_without_one(model: LanguageModel, engine: Engine, grammars: Grammars):
    letters = TokenLimits(model.model.vocab_size, allowed=model.tokenizer.encode("a"))
    found = answers(engine, [Both(grammars.constraint("regex", "ab"), letters), grammars.constraint("regex", "ab")])
    assert [(text(model, tokens), reason) for tokens, reason in found] == [("a", "stuck"), ("ab", "stop")]


def test_where_no_token_is_left_none_is_drawn(model: LanguageModel, engine: Engine, grammars: Grammars):
    """Lists that exclude each other from the beginning, or later; greedy draws take the first of equal logits."""
    vocab = model.model.vocab_size
    limits = [
        TokenLimits(vocab, allowed=[9], never=[[9]]),
        TokenLimits(vocab, allowed=[9], never=[[9, 9]]),
        TokenLimits(vocab, allowed=[9], late=[9], first=2),
    ]
    got: list[list[Progress]] = [[] for _ in limits]
    for own, constraint in zip(got, limits, strict=True):
        sampling = SamplingParameters(temperature=0.0)
        engine.add(Request((5, 6, 7), 4, sampling, constraint=constraint), own.append)
    while engine.step():
        pass
    found = [([token for each in own for token in each.tokens], own[-1].reason) for own in got]
    assert found == [([], "stuck"), ([9], "stuck"), ([], "stuck")]
    assert all("allows no token" in own[-1].why for own in got)


def test_a_library_that_gives_up_is_asked_why(model: LanguageModel, grammars: Grammars):
    """The bit of its token is set, and it takes the token for none."""

    class GivesUp:
        def compute_bitmask(self) -> bytes:
            return b"\xff" * 4 * words_of(model.model.vocab_size)

        def consume_token(self, token: int) -> bool:
            return False

        def is_error(self) -> bool:
            return True

        def get_error(self) -> str:
            return "too many\n items<state>and more"

    constraint = Both(_Grammar(GivesUp()), TokenLimits(model.model.vocab_size))
    words = np.full(words_of(model.model.vocab_size), -1, np.int32)
    constraint.allow(words)
    assert not constraint.take(7) and constraint.failure == "too many items"


@pytest.mark.slow
def test_generate_says_that_a_shape_allows_nothing(model: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    module = sys.modules["cramjax.serve.generate"]
    limits = [TokenLimits(model.model.vocab_size, allowed=[9], never=[[9]])]
    monkeypatch.setattr(module, "constraints_for", lambda *_: limits)
    (found,) = generate(model, "the", max_tokens=4, regex="a")
    assert (found.text, found.tokens, found.stopped) == ("", 0, "stuck")


def test_the_same_grammar_begins_anew_each_time(engine: Engine, model: LanguageModel, grammars: Grammars):
    many = [grammars.constraint("regex", "(ab){2}") for _ in range(6)]
    assert {text(model, tokens) for tokens, _ in answers(engine, many)} == {"abab"}
    assert grammars._matcher.cache_info().hits >= 5


@pytest.mark.parametrize(
    ("kind", "what", "message"),
    [
        ("json", {"type": "strin"}, "Invalid type: strin"),
        ("json", {"properties": 3}, "properties must be an object"),
        ("json", {"not": {"type": "string"}}, "Unimplemented"),
        ("json", {"$ref": "http://nowhere/x"}, "not present"),
        ("json", {"enum": []}, "Unsatisfiable"),
        ("json", "no schema", "cannot be"),
        ("regex", "a(", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("grammar", "start: nothing", "unknown name"),
        ("grammar", "", "cannot be used"),
    ],
)
def test_what_is_no_grammar_is_one_message(grammars: Grammars, kind: Any, what: Any, message: str):
    with pytest.raises(ConfigError, match=message) as raised:
        grammars.constraint(kind, what)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_words_hold_a_bit_for_every_token():
    words = np.full(words_of(65), -1, np.int32)
    TokenLimits(65, allowed=[0, 31, 64]).allow(words)
    assert [t for t in range(96) if words[t // 32] >> (t % 32) & 1] == [0, 31, 64]


@pytest.mark.parametrize("size", [287, 288, 289])
def test_a_vocabulary_may_have_any_size(size: int):
    tokenizer = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=size), [inspect.getsource(json)])
    assert tokenizer.vocab_size == size
    grammar = Grammars(tokenizer).constraint("regex", "[xyz]")
    for padded in (0, 1):  # a model's vocabulary may have more words than its tokenizer's
        words = np.full(words_of(size) + padded, -1, np.int32)
        grammar.allow(words)
        allowed = [token for token in range(32 * len(words)) if words[token // 32] >> token % 32 & 1]
        assert sorted(tokenizer.decode([token]) for token in allowed) == ["x", "y", "z"]


@pytest.mark.slow
def test_generate_gives_what_was_asked_for(run_of: Callable[..., Any]):
    run = run_of(sequence_length=64, kv_heads=1)
    told: list[str] = ["", ""]

    def tell(number: int, piece: str, is_last: bool) -> None:
        told[number] += piece

    found = generate(run, ["the ", "a"], max_tokens=200, regex="[ab]{3}🙂", temperature=1.0, told=tell)
    assert all(re.fullmatch("[ab]{3}🙂", each.text) for each in found) and {each.stopped for each in found} == {"shape"}
    assert told == [each.text for each in found]
    schema = {"type": "array", "items": {"enum": [1, 22]}, "minItems": 30, "maxItems": 40}  # longer than the window
    (made,) = generate(run, "the ", max_tokens=300, json_schema=schema, temperature=1.0)
    jsonschema.validate(json.loads(made.text), schema)
    assert made.stopped == "shape" and made.tokens > 64
    with pytest.raises(ConfigError, match="json_schema and regex exclude each other"):
        generate(run, "the ", json_schema={}, regex="a")
