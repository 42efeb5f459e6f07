"""Embeddings: each text's vector is of its own tokens alone, pooled, whatever else is given."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax import cli
from cramjax.embeddings import EmbeddingConfig
from cramjax.errors import ConfigError, DataError
from cramjax.language_model import LanguageModel
from cramjax.serve import embed, tokens_to_embed
from cramjax.training import Run

MakeRun = Callable[..., Run]
MakeModel = Callable[..., LanguageModel]
TEXTS = ["the stack walks", "", "every token pays for its own place in the budget", "block by block", "walks"]


@pytest.fixture
def model_of(run_of: MakeRun) -> Callable[..., LanguageModel]:
    """Makes a model that computes in float32, whatever this machine would."""

    def make(kind: Any = "masked") -> LanguageModel:
        model = run_of(kind, sequence_length=64).language_model
        return replace(model, model=replace(model.model, compute_dtype="float32"))

    return make


def pooled(model: LanguageModel, texts: list[list[int]], pooling: str) -> list[np.ndarray]:
    """The vectors of texts in a padded batch, pooled in float64."""
    there = np.arange(max(map(len, texts))) < np.array([len(text) for text in texts])[:, None]
    rows = np.zeros(there.shape, np.int32)
    rows[there] = np.concatenate(texts)
    walk = jax.jit(lambda p, t, m: model.model.normed(p, model.model.stream(p, t, kv_mask=m)))
    streams = np.asarray(walk(model.params, jnp.asarray(rows), jnp.asarray(there)), np.float64)
    each = [stream[: len(text)] for stream, text in zip(streams, texts, strict=True)]
    vectors = [{"mean": rows.mean(axis=0), "cls": rows[0], "last": rows[-1]}[pooling] for rows in each]
    return [vector / np.linalg.norm(vector) for vector in vectors]


@pytest.mark.parametrize(("kind", "pooling"), [("masked", "mean"), ("masked", "cls"), ("causal", "last")])
def test_a_vector_is_its_own_texts(model_of: MakeModel, kind: Any, pooling: Any):
    model = model_of(kind)
    words = model.tokenizer
    found = embed(model, TEXTS, pooling=pooling)
    assert found.shape == (len(TEXTS), 32) and found.dtype == np.float32
    ids = [[words.separator_id, *words.encode(text), words.separator_id] for text in TEXTS]
    # Float32 sums in another order.
    np.testing.assert_allclose(found, pooled(model, ids, pooling), atol=1e-5)
    backwards = embed(model, tokens_to_embed(model, TEXTS[::-1]), pooling=pooling)
    np.testing.assert_allclose(backwards, found[::-1], atol=1e-5)


def test_it_is_done_as_the_model_says(model_of: MakeModel):
    model = model_of()
    told = replace(model, embedding=EmbeddingConfig("cls", normalise=False, max_tokens=6))
    long = TEXTS[2]
    with pytest.raises(DataError, match=r"text 1 has \d+ tokens; .* embeds texts of at most 4"):
        embed(told, ["block", long])
    found = embed(told, [long], cut=True)[0]
    ids = tokens_to_embed(told, [long], cut=True)[0]
    assert len(ids) == 6 and ids[0] == ids[-1] == model.tokenizer.separator_id
    np.testing.assert_allclose(found / np.linalg.norm(found), pooled(model, [ids], "cls")[0], atol=1e-5)
    assert abs(np.linalg.norm(found) - 1) > 0.1


def test_nothing_of_nothing(run_of: MakeRun):
    assert embed(run_of("masked"), []).shape == (0, 32)


def test_mistakes_are_named(run_of: MakeRun):
    run = run_of("masked")
    with pytest.raises(ConfigError, match="pooling must be one of mean, cls, last, got 'max'"):
        embed(run, ["a"], pooling="max")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"text 0 must be ids from 0 to 299, got \[300\]"):
        embed(run, [[300]])
    with pytest.raises(DataError, match=r"text 0 must be ids from 0 to 299, got \[\]"):
        embed(run, [[]])


def test_token_counts_and_progress(run_of: MakeRun):
    told: list[tuple[int, int]] = []
    embed(run_of("masked", sequence_length=64), TEXTS, progress=lambda done, of: told.append((done, of)))
    assert told[-1] == (5, 5) and jax.tree.all([a < b for (a, _), (b, _) in zip(told, told[1:], strict=False)])


def test_the_command_embeds_lines_and_rows(model_of: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, out = model_of(), tmp_path / "out.npy"
    path, texts = model.save(tmp_path / "model"), [text for text in TEXTS if text]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    rows = "\n".join(json.dumps({"body": text}) for text in texts)
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    assert cli.main(["embed", str(path), "--texts", str(tmp_path / "texts.txt"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 4 vectors of 32 numbers\n"
    np.testing.assert_array_equal(np.load(out), embed(model, texts))
    of_rows = ["embed", str(path), "--texts", str(tmp_path / "rows.jsonl"), "--out"]
    assert cli.main([*of_rows, str(out), "--field=body"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*of_rows, str(tmp_path / "other.npy"), "--field=body"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "other.npy"), np.load(out))
    assert cli.main([*of_rows, str(tmp_path / "third.npy")]) == 2
    assert "no field 'text'" in capsys.readouterr().err and not (tmp_path / "third.npy").exists()
