"""The notebook API over one tiny run: what `train` leaves, and what the other names make of it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cramjax
from cramjax.errors import ConfigError, DataError, RunError
from cramjax.evaluation import evaluate_text
from cramjax.training import Run
from cramjax.training.metrics import read_records

TINY: dict[str, Any] = {
    "budget": "60steps",
    "tokenizer": {"vocab_size": 300},
    "model": {"layers": 1, "width": 32, "heads": 2, "mlp": 64},
    "batch": {"size": 8},
    "evaluate": {"points": 2, "batch": 8, "samples": ["the stack", ""]},
    "checkpoint": {"points": 1},
    "train": {"data_parallel": 1},
}


def tiny(corpus: Path, **overrides: Any) -> Any:
    data = {"source": str(corpus / "*.txt"), "sequence_length": 32, "validation_fraction": 0.2}
    return cramjax.recipe("quickstart", data=data, **{**TINY, **overrides})


@pytest.fixture(scope="module")
def run(corpus: Path, cache_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return cramjax.train(tiny(corpus), tmp_path_factory.mktemp("runs") / "tiny", quiet=True)


def test_importing_costs_nothing_and_no_package_takes_a_functions_name():
    code = (
        "import sys, cramjax\n"
        "heavy = {'jax', 'flax', 'numpy', 'matplotlib', 'datasets', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import cramjax.training.display, cramjax.evaluation.baselines\n"
        "assert all(callable(getattr(cramjax, name)) for name in cramjax.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_train_finishes_the_run(run: Run):
    assert {"report.html", "summary.json", "config.yaml", "metrics.jsonl", "tokenizer.json", "model"} <= {
        file.name for file in run.path.iterdir()
    }
    assert json.loads((run.path / "summary.json").read_text(encoding="utf-8")) == run.summary
    assert set(run.summary["baselines"]) == {"xz", "unigram", "bigram"}
    records = [record for record in read_records(run.path) if record["kind"] == "sample"]
    assert [record["prompt"] for record in records] == ["the stack", ""]
    report = (run.path / "report.html").read_text(encoding="utf-8")
    assert f"{run.summary['bits_per_byte']:.3f}" in report and records[0]["text"][:5] in report


def test_a_run_ends_with_a_model_directory_and_its_card(run: Run):
    model = cramjax.load(run.path / "model")
    prompt = {"temperature": 0, "max_tokens": 8}
    assert str(cramjax.generate(model, "the", **prompt)) == str(cramjax.generate(run, "the", **prompt))
    card = (run.path / "model" / "README.md").read_text(encoding="utf-8")
    assert f"| held-out bits per byte | {run.summary['bits_per_byte']:.3f} |" in card
    assert "budget of 60steps" in card and "vocab_size: 300" in card and "cramjax generate MODEL" in card
    assert not (run.path / "model.new").exists()


def test_baselines_are_ordered_as_theory_has_it(run: Run):
    """The corpus repeats 19 words in an arithmetic order: pairs say more than frequencies, and a model learns both."""
    scores = run.summary["baselines"]
    assert scores["bigram"] < scores["unigram"]
    assert run.summary["bits_per_byte"] < scores["unigram"]


def test_evaluate_gives_the_score_of_the_run(run: Run):
    evaluation = cramjax.evaluate(run)
    np.testing.assert_allclose(evaluation.bits_per_byte, run.summary["bits_per_byte"], rtol=1e-6)
    assert f"{evaluation.bits_per_byte:.4f} bits per byte" in str(evaluation)
    assert f"<b>{evaluation.bits_per_byte:.4f}</b>" in evaluation._repr_html_()


def test_a_loaded_run_scores_and_writes_the_same(run: Run):
    loaded = cramjax.load(run.path)
    assert cramjax.evaluate(loaded) == cramjax.evaluate(run)
    assert cramjax.generate(loaded, "the", seed=3) == cramjax.generate(run, "the", seed=3)


def test_any_text_is_scored_whole_as_the_model_alone_would(run: Run, tmp_path: Path):
    """Against the forward pass over the padded sequences, the log-softmax taken in float64."""
    text = "the budget of one long day walks block by block. Ünïcode too! " * 9
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    evaluation = cramjax.evaluate(run, file)

    separator = run.tokenizer.separator_id
    tokens = [separator, *run.tokenizer.encode(text), separator]
    length = run.config.data.sequence_length
    hidden_of = jax.jit(run.model.hidden)
    nats = 0.0
    for start in range(0, len(tokens) - 1, length):
        row = tokens[start : start + length + 1]
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(row) - 1] = row[:-1]
        hidden = hidden_of(run.params, jnp.asarray(padded))
        logits = np.asarray(run.model.logits(run.params, hidden), np.float64)[0, : len(row) - 1]
        logits -= logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= log_p[np.arange(len(row) - 1), row[1:]].sum()
    assert evaluation.tokens == len(tokens) - 1
    assert evaluation.bytes == pytest.approx(len(text.encode()))
    # Products in bfloat16 round differently in a batch of another shape.
    np.testing.assert_allclose(evaluation.bits_per_byte, nats / np.log(2) / len(text.encode()), rtol=5e-3)


def test_files_are_scored_together(run: Run, tmp_path: Path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, text in zip(files, ("the stack walks", "one long day"), strict=True):
        file.write_text(text, encoding="utf-8")
    assert evaluate_text(run, files).bytes == pytest.approx(len("the stack walks") + len("one long day"))


@pytest.mark.parametrize("content", [b"", b"\x00\x01binary", None], ids=["empty", "binary", "missing"])
def test_text_that_cannot_be_scored(run: Run, tmp_path: Path, content: bytes | None):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"text\.txt"):
        cramjax.evaluate(run, file)


def test_results_show_themselves(run: Run):
    assert str(run.path) in repr(run) and f"{run.summary['bits_per_byte']:.3f}" in repr(run)
    assert "<table>" in run._repr_html_() and "training tokens" in run._repr_html_()
    assert run.plot()._repr_svg_().startswith("<svg")
    unfinished = dataclasses.replace(run, summary={})
    assert "not finished" in repr(unfinished) and "not finished" in unfinished._repr_html_()
    assert "vocab_size: 300" in run.config._repr_html_()


@pytest.mark.slow
def test_a_masked_run_fills_masks_at_its_end(corpus: Path, tmp_path: Path):
    samples = {**TINY["evaluate"], "samples": ["the [MASK] walks"]}
    config = tiny(corpus, objective={"kind": "masked"}, evaluate=samples, budget="4steps")
    masked = cramjax.train(config, tmp_path / "masked", quiet=True)
    records = [record for record in read_records(masked.path) if record["kind"] == "sample"]
    assert [record["prompt"] for record in records] == ["the [MASK] walks"]
    assert "[MASK] 1:" in records[0]["text"]
    assert "compare them among masked models" in (masked.path / "report.html").read_text(encoding="utf-8")


def test_mistakes_are_named(corpus: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="quickstart"):
        cramjax.recipe("quikstart")
    with pytest.raises(ConfigError, match="give overrides to `recipe`"):
        cramjax.train(tiny(corpus), tmp_path / "x", budget="5steps")
    with pytest.raises(RunError, match="is not a run directory"):
        cramjax.load(tmp_path)
