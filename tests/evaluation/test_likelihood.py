"""Log-likelihoods against the definition: one row at a time, in float64 after the logits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cramjax.errors import DataError, RunError
from cramjax.evaluation.likelihood import _without_prefixes, loglikelihoods, pseudo_loglikelihoods
from cramjax.language_model import LanguageModel
from cramjax.model import Model
from cramjax.serve.generate import continue_rows
from cramjax.serve.sampling import Sampling

from .helpers import MakeModel


@partial(jax.jit, static_argnums=0)
def all_logits(model: Model, params: Any, tokens: Any) -> Any:
    return model.logits(params, model.hidden(params, tokens)[0])


def log_probabilities(model: LanguageModel, row: list[int]) -> np.ndarray:
    """Of every token at every place of one row, float64. A causal model's may be followed by anything."""
    followed = row if model.kind == "masked" else [*row, *[3] * (model.context - len(row))]
    tokens = jnp.asarray([followed], jnp.int32)
    logits = np.asarray(all_logits(model.model, model.params, tokens), np.float64)[: len(row)]
    greatest = logits.max(-1, keepdims=True)
    return logits - greatest - np.log(np.exp(logits - greatest).sum(-1, keepdims=True))


def by_definition(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    row = (context + continuation)[-(model.context + 1) :]
    found = log_probabilities(model, row[:-1])[-len(continuation) :]
    best = found.argmax(-1).tolist() == continuation
    return float(found[np.arange(len(continuation)), continuation].sum()), best


def some_pairs(seed: int, count: int, most: int = 40) -> list[tuple[list[int], list[int]]]:
    """Ragged ones, of which many share contexts, and some are one token long."""
    rng = np.random.default_rng(seed)
    contexts = [rng.integers(2, 400, rng.integers(1, most)).tolist() for _ in range(max(1, count // 3))]
    return [
        (contexts[rng.integers(len(contexts))], rng.integers(2, 400, rng.integers(1, 9)).tolist()) for _ in range(count)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "learned", "mask_documents": True},
        {"window": 5, "qk_norm": True, "logit_softcap": 15.0},
        {"tied": False, "bigram_buckets": 64, "adaptive_head": (64, 128), "activation": "swiglu"},
    ],
    ids=str,
)
def test_likelihoods_are_those_of_each_row_alone(model_of: MakeModel, options: dict[str, Any]):
    model = model_of(context=32, **options)
    pairs = some_pairs(0, 14)
    pairs += [(pairs[0][0], [token]) for token in range(5, 9)]  # one row answers four
    pairs += [([1, 2, 0, 3], [4, 0, 5]), ([7] * 50, [8] * 32)]  # separators; a context that does not fit
    found = loglikelihoods(model, pairs)
    expected = [by_definition(model, *pair) for pair in pairs]
    np.testing.assert_allclose([each.total for each in found], [total for total, _ in expected], atol=2e-4)
    assert [each.greedy for each in found] == [greedy for _, greedy in expected]


def test_likelihoods_do_not_depend_on_the_batch(causal: LanguageModel):
    pairs = some_pairs(1, 40)
    whole = loglikelihoods(causal, pairs)
    order = np.random.default_rng(2).permutation(len(pairs))
    shuffled = loglikelihoods(causal, [pairs[number] for number in order])
    for place, number in enumerate(order):
        assert shuffled[place] == whole[number]
    alone = [loglikelihoods(causal, [pair])[0].total for pair in pairs[:6]]
    np.testing.assert_allclose(alone, [each.total for each in whole[:6]], atol=1e-4)


def test_what_is_drawn_greedily_is_greedy(causal: LanguageModel):
    row = [causal.tokenizer.separator_id, 40, 50]
    rows = [list(row)]
    continue_rows(causal, rows, 10, Sampling(temperature=0.0), 0)
    drawn = rows[0][3:]
    last = (drawn[-1] + 1) % causal.model.vocab_size
    both = loglikelihoods(causal, [(row, drawn), (row, [*drawn[:-1], last])])
    assert [each.greedy for each in both] == [True, False]
    assert both[0].total > both[1].total


def test_rows_that_begin_others_are_read_off_them(causal: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    """Four answers of one token, and a text in full: two rows, where there were six."""
    seen = []
    pairs = [([1, 2, 3], [token]) for token in (4, 5, 6, 7)] + [([1, 2], [9, 9]), ([1, 2, 3, 4], [5])]
    loglikelihoods(causal, pairs, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(2, 2)]  # 1 2 3 4 answers for 1 2 3, 1 2 9 for itself


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), min_size=1, max_size=12))
def test_rows_kept_are_those_that_begin_no_other(rows: list[tuple[int, ...]]):
    kept, place = _without_prefixes(rows)
    begin_another = {row for row in rows for other in rows if other != row and other[: len(row)] == row}
    assert sorted(kept) == sorted(set(rows) - begin_another)
    assert all(kept[place[row]][: len(row)] == row for row in rows)


def test_pseudo_likelihoods_mask_each_token_alone(model_of: MakeModel):
    model = model_of(kind="masked", context=32, mask_documents=True)
    words, mask = model.tokenizer, model.tokenizer.mask_id
    texts = [words.encode(text) for text in ("The author laughs.", "The author near the kings", "A")]
    found = pseudo_loglikelihoods(model, texts)
    for text, each in zip(texts, found, strict=True):
        total, right = 0.0, []
        framed = [words.separator_id, *text, words.separator_id]
        for place in range(1, len(text) + 1):
            hidden = [*framed[:place], mask, *framed[place + 1 :]]
            logs = log_probabilities(model, hidden)[place]  # pyright: ignore[reportArgumentType]
            total += logs[framed[place]]
            right.append(int(logs.argmax()) == framed[place])
        np.testing.assert_allclose(each.total, total, atol=2e-4)
        assert each.greedy == all(right)


def test_nothing_asked_is_nothing_answered(causal: LanguageModel, masked: LanguageModel):
    assert loglikelihoods(causal, []) == [] and pseudo_loglikelihoods(masked, []) == []


def test_mistakes(causal: LanguageModel, masked: LanguageModel, model_of: MakeModel):
    with pytest.raises(RunError, match="a-model is a masked model, which gives no probability of a continuation"):
        loglikelihoods(masked, [([1], [2])])
    with pytest.raises(RunError, match="is an encoder without a head"):
        loglikelihoods(model_of(kind="encoder"), [([1], [2])])
    with pytest.raises(RunError, match="is not a masked model"):
        pseudo_loglikelihoods(causal, [[1]])
    with pytest.raises(DataError, match="request 1 has an empty context or continuation"):
        loglikelihoods(causal, [([1], [2]), ([1], [])])
    with pytest.raises(DataError, match="continuation of request 0 has 65 tokens, and a-model sees at most 64"):
        loglikelihoods(causal, [([1], [2] * 65)])
    with pytest.raises(DataError, match="text 0 has 63 tokens; a-model scores texts of 1 to 62"):
        pseudo_loglikelihoods(masked, [[5] * 63])
