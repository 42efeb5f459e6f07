"""Generation against the plain forward pass over the same text, token by token and without a cache."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ConfigError, RunError
from cramjax.serve import generate, stream
from cramjax.serve.engine import Engine
from cramjax.serve.generate import continue_rows
from cramjax.serve.sampling import Sampling
from cramjax.serving import EngineConfig
from cramjax.training import Run

MakeRun = Callable[..., Run]

GREEDY = Sampling(temperature=0.0)


def greedy_by_definition(run: Run, row: list[int], max_tokens: int) -> list[int]:
    """The likeliest token after a full forward pass, over and over, with the documented window."""
    row, window = list(row), run.config.data.sequence_length
    seen = list(row) if len(row) < window else row[-(window // 2) :]
    hidden = jax.jit(run.model.hidden)
    for _ in range(max_tokens):
        if len(seen) == window:
            seen = seen[-(window // 2) :]
        padded = np.zeros((1, window), np.int32)
        padded[0, : len(seen)] = seen
        logits = np.array(run.model.logits(run.params, hidden(run.params, jnp.asarray(padded))[0, len(seen) - 1]))
        logits[run.tokenizer.mask_id] = -np.inf
        seen.append(int(logits.argmax()))
        row.append(seen[-1])
        if row[-1] == run.tokenizer.separator_id:
            break
    return row


@pytest.mark.slow
def test_rows_past_what_memory_takes_wait(run_of: MakeRun, monkeypatch: pytest.MonkeyPatch):
    """Two at once: every row gets what it gets beside the others, past the context too."""
    module, run = sys.modules["cramjax.serve.generate"], run_of()
    rows, made = [[5 + number] * (1 + number) for number in range(5)], list[int]()

    def engine(model: Any, config: EngineConfig, *more: Any) -> Engine:
        made.append(config.slots)
        return Engine(model, config, *more)

    monkeypatch.setattr(module, "Engine", engine)
    together = continued(run, rows, 20, Sampling(temperature=1.0), seed=3)
    monkeypatch.setattr(module, "_LEAST_ROWS", 2)
    monkeypatch.setattr(module, "_MOST_BYTES", 0)
    assert continued(run, rows, 20, Sampling(temperature=1.0), seed=3) == together
    assert made == [5, 2]


def test_ten_thousand_rows_of_a_large_vocabulary_take_two_gibibytes(run_of: MakeRun):
    """By the bytes of a row: history (a bool, an int32 and a float32 a word), a logit, keys and values."""
    module, model = sys.modules["cramjax.serve.generate"], run_of().language_model
    row = model.model.vocab_size * (1 + 4 + 4 + 4)
    row += 128 * 2 * 2 * 32 * jnp.dtype(model.model.compute_dtype).itemsize  # layers, keys and values, width
    rows = module._rows_at_once(model, 1_000_000, 128)
    assert rows * row <= 2**31 < (rows + 1) * row
    assert module._rows_at_once(model, 9, 128) == 9 and module._rows_at_once(model, 99, 10**9) == 8


def continued(run: Run, rows: list[list[int]], max_tokens: int, sampling: Sampling = GREEDY, seed: int = 0):
    rows = [list(row) for row in rows]
    continue_rows(run, rows, max_tokens, sampling, seed)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"positions": "learned"},
        {"positions": "sinusoidal", "norm": "rmsnorm", "tied": False},
        {"qk_norm": True, "kv_heads": 1, "logit_softcap": 15.0, "embedding_skip": True, "value_embeddings": True},
        {"window": 5, "mask_documents": True},
        {"bigram_buckets": 64, "tied": False, "adaptive_head": (64, 128), "activation": "swiglu"},
    ],
    ids=str,
)
def test_cached_decoding_is_the_forward_pass(run_of: MakeRun, model: dict):
    """Rows of unequal length decode together, far past the sequence length, to what each gives alone uncached."""
    run = run_of(**model)
    separator = run.tokenizer.separator_id
    rows = [[separator], [separator, *range(40, 49)], [separator, *range(60, 100)]]
    assert continued(run, rows, 30) == [greedy_by_definition(run, row, 30) for row in rows]


def test_generate_gives_the_text_of_its_tokens(run_of: MakeRun):
    run = run_of(seed=1)
    prompts = ["the stack ", ""]
    results = generate(run, prompts, max_tokens=20, temperature=0.0)
    for prompt, result in zip(prompts, results, strict=True):
        ids = [run.tokenizer.separator_id, *run.tokenizer.encode(prompt)]
        row = greedy_by_definition(run, ids, 20)
        assert result.prompt == prompt and str(result) == prompt + result.text
        assert result.tokens == len(row) - len(ids)
        assert result.text == run.tokenizer.decode(row[len(ids) :])
        assert result.stopped == ("separator" if row[-1] == run.tokenizer.separator_id else "length")


@pytest.mark.slow
def test_text_comes_in_pieces_as_it_is_drawn(run_of: MakeRun):
    """Through windows that slide, and with guesses: what the pieces make is the text, and guessing changes nothing."""
    run = run_of(seed=1)
    prompts = ["the stack the stack the", "every"]
    told: list[tuple[int, str, bool]] = []
    plain = generate(run, prompts, max_tokens=40, temperature=0.0, told=lambda *what: told.append(what))
    for number, whole in enumerate(plain):
        own = [(piece, is_last) for place, piece, is_last in told if place == number]
        assert "".join(piece for piece, _ in own) == whole.text
        assert [is_last for _, is_last in own] == [False] * (len(own) - 1) + [True] and len(own) > 2
    assert "".join(stream(run, prompts[0], max_tokens=40, temperature=0.0)) == plain[0].text
    guessing = generate(run, prompts, max_tokens=40, temperature=0.0, lookup=3)
    assert [each.text for each in guessing] == [each.text for each in plain]
    assert sum(each.guessed for each in guessing) > 0 and all(0 <= each.right <= each.guessed for each in guessing)
    assert sum(each.guessed for each in plain) == 0


@pytest.mark.slow
def test_a_separator_ends_a_document(run_of: MakeRun):
    run = run_of(head_bias=True)
    separator = run.tokenizer.separator_id
    run.params["head"]["decoder"] = {"bias": jnp.zeros(run.model.sizes.vocab).at[separator].set(100.0)}
    rows = continued(run, [[separator], [separator, 50]], 10)
    assert rows == [[separator, separator], [separator, 50, separator]]
    result = generate(run, "the", max_tokens=10)[0]
    assert (result.text, result.tokens, result.stopped) == ("", 1, "separator")


@pytest.mark.slow
def test_the_seed_decides_and_neighbours_do_not(run_of: MakeRun):
    run = run_of()
    hot = Sampling(temperature=1.0)
    first = [run.tokenizer.separator_id, 50, 51]
    alone = continued(run, [first], 25, hot, seed=7)
    beside = continued(run, [first, [*first, *range(30, 60)]], 25, hot, seed=7)
    assert alone[0] == beside[0]
    assert continued(run, [first], 25, hot, seed=7) == alone
    assert continued(run, [first], 25, hot, seed=8) != alone


@pytest.mark.slow
def test_same_prompts_draw_differently_in_one_batch(run_of: MakeRun):
    run = run_of()
    texts = {str(result) for result in generate(run, ["the"] * 4, max_tokens=20, temperature=1.0)}
    assert len(texts) == 4


def test_the_mask_token_is_never_drawn(run_of: MakeRun):
    run = run_of(head_bias=True)
    mask = run.tokenizer.mask_id
    run.params["head"]["decoder"] = {"bias": jnp.zeros(run.model.sizes.vocab).at[mask].set(100.0)}
    rows = continued(run, [[run.tokenizer.separator_id]], 12, Sampling(temperature=1.0))
    assert mask not in rows[0]


def test_markup_in_text_is_shown_as_text(run_of: MakeRun):
    run = run_of()
    html = generate(run, "<b>the</b>", max_tokens=3)[0]._repr_html_()
    assert "&lt;b&gt;the&lt;/b&gt;" in html


def test_no_prompts_no_text(run_of: MakeRun):
    assert generate(run_of(), []) == []


def test_mistakes_are_named(run_of: MakeRun):
    with pytest.raises(RunError, match="masked model"):
        generate(run_of("masked"), "the")
    with pytest.raises(ConfigError, match="max_tokens must be 1 or more, got 0"):
        generate(run_of(), "the", max_tokens=0)
    with pytest.raises(ConfigError, match="lookup must be 1 or more tokens, or 0 for none, got -1"):
        generate(run_of(), "the", lookup=-1)
