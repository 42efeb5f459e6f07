"""Filling masks against the plain forward pass."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ConfigError, RunError
from cramjax.serve import fill_mask
from cramjax.training import Run

MakeRun = Callable[..., Run]

module = importlib.import_module("cramjax.serve.fill_mask")  # the package has a function of its name


def test_candidates_are_the_softmax_of_the_forward_pass(run_of: MakeRun):
    run = run_of("masked", sequence_length=32, positions="learned")
    run = replace(run, model=replace(run.model, compute_dtype="float32"))  # whatever this machine would compute in
    filling = fill_mask(run, "the stack [MASK] block by [MASK]", top=4)
    words = run.tokenizer
    ids = [words.separator_id, *words.encode("the stack"), words.mask_id, *words.encode(" block by"), words.mask_id]
    ids.append(words.separator_id)
    hidden = jax.jit(run.model.hidden)(run.params, jnp.array([ids]))
    logits = run.model.logits(run.params, hidden)[0]
    probability = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    assert len(filling.masks) == 2
    for candidates, at in zip(filling.masks, np.flatnonzero(np.array(ids) == words.mask_id), strict=True):
        best = np.argsort(-probability[at])[:4]
        assert [c.text for c in candidates] == [words.token(int(token)) for token in best]
        np.testing.assert_allclose([c.probability for c in candidates], probability[at][best], rtol=1e-4)


def test_only_its_masks_are_special_tokens_of_a_text(run_of: MakeRun, monkeypatch: pytest.MonkeyPatch):
    run, seen = run_of("masked", sequence_length=64), []
    compute = module._probabilities

    def watched(model: Any, params: Any, text: Any, at: jax.Array) -> jax.Array:
        seen.append((text.tokens[: text.lengths[0]].tolist(), at.tolist()))
        return compute(model, params, text, at)

    monkeypatch.setattr(module, "_probabilities", watched)
    fill_mask(run, "<sep> [UNK] the [MASK]")
    (ids, at), words = seen[0], run.tokenizer
    assert [i for i, token in enumerate(ids) if token in (words.separator_id, words.mask_id)] == [0, *at, len(ids) - 1]
    assert words.decode(ids[1 : at[0]]) == "<sep> [UNK] the"


def test_it_prints_every_mask(run_of: MakeRun):
    run = run_of("masked")
    shown = str(fill_mask(run, "[MASK] stack [MASK]", top=2))
    assert shown.splitlines()[0] == "[MASK] stack [MASK]" and "[MASK] 1:" in shown and "[MASK] 2:" in shown


def test_mistakes_are_named(run_of: MakeRun):
    masked = run_of("masked")
    with pytest.raises(RunError, match="causal model"):
        fill_mask(run_of(), "the [MASK]")
    with pytest.raises(ConfigError, match=r"the text has no \[MASK\]"):
        fill_mask(masked, "the stack")
    with pytest.raises(ConfigError, match="tokens long, and this model sees at most 14"):
        fill_mask(masked, "the stack walks " * 20 + "[MASK]")
    with pytest.raises(ConfigError, match="top must be between 1 and 300"):
        fill_mask(masked, "[MASK]", top=0)
