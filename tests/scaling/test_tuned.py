"""Comparisons and sweeps of recipes that tune a model, by an adapter and on examples."""

import json
from pathlib import Path

import pytest
import yaml

from cramjax.errors import ConfigError
from cramjax.model import count_parameters
from cramjax.recipes import load_recipe
from cramjax.scaling.compare.plots import mean_curve
from cramjax.scaling.compare.run import compare
from cramjax.scaling.sweep.axes import read_sweep
from cramjax.scaling.sweep.run import run_sweep
from cramjax.training import Run, train
from tests.training.conftest import TINY


@pytest.fixture(scope="module")
def parent(corpus: Path, cache_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model that is no recipe's."""
    fields = {**TINY, "data.source": str(corpus / "*.txt"), "budget": "1steps", "model.width": 48}
    return train(load_recipe("quickstart", fields), tmp_path_factory.mktemp("parents") / "parent")


@pytest.fixture(scope="module")
def fields(parent: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Of a recipe that tunes it."""
    file = tmp_path_factory.mktemp("examples") / "sums.jsonl"
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {"model.from": str(parent.path), "examples.source": str(file), "examples.format": "completion"}
    return {**given, "budget": "2steps", "data.sequence_length": 32, "adapter.rank": 2, "train.data_parallel": 1}


@pytest.mark.slow
def test_two_adapters_are_compared(fields: dict[str, object], tmp_path: Path):
    """On rows of other lengths: what is held out is the same."""
    a = load_recipe("tune-chat", fields)
    b = load_recipe("tune-chat", {**fields, "adapter.rank": 4, "data.sequence_length": 24})
    found = compare(a, b, tmp_path / "out", seeds=1)
    assert found.pairs[0].a is not None and found.pairs[0].b is not None
    assert found.pairs[0].a.failure is None and found.pairs[0].b.failure is None
    assert 0 < found.pairs[0].a.score < 20  # pyright: ignore[reportOperatorIssue]
    assert set(found.differing) == {"adapter.rank", "data.sequence_length"}


@pytest.mark.slow
def test_a_sweep_counts_the_parameters_of_the_model(fields: dict[str, object], parent: Run, tmp_path: Path):
    axes = {"grid": {"adapter": [None, {"rank": 2}]}}
    given = {name: value for name, value in fields.items() if name != "adapter.rank"}
    sweep = {"base": "tune-chat", "set": given, "axes": axes}
    file = tmp_path / "ranks.yaml"
    file.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    rows = run_sweep(file, tmp_path / "out", jobs=1).rows
    assert [row["status"] for row in rows] == ["done", "done"], [row["error"] for row in rows]
    counted = count_parameters(parent.config.model, parent.tokenizer.vocab_size, 32)
    for row in rows:
        assert (row["params"], row["params_non_embedding"]) == (counted.total, counted.blocks)


@pytest.fixture(scope="module")
def labelled(parent: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Of a recipe that tunes it on classes."""
    file = tmp_path_factory.mktemp("labels") / "parity.jsonl"
    rows = [{"text": f"{n} and {n + 1}", "label": ("even", "odd")[n % 2]} for n in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {"model.from": str(parent.path), "labels.source": str(file), "objective.kind": "causal_labels"}
    return {**given, "budget": "2steps", "data.sequence_length": 32, "train.data_parallel": 1}


@pytest.mark.slow
def test_two_recipes_are_compared_by_accuracy(labelled: dict[str, object], tmp_path: Path):
    a = load_recipe("tune-classify", labelled)
    b = load_recipe("tune-classify", {**labelled, "optim.lr": 1e-3, "data.sequence_length": 24})
    found = compare(a, b, tmp_path / "out", seeds=1)
    pair = found.pairs[0]
    assert pair.a is not None and pair.b is not None and pair.a.failure is None and pair.b.failure is None
    for side in ("a", "b"):
        summary = json.loads((tmp_path / "out" / "seed-0" / side / "summary.json").read_text(encoding="utf-8"))
        assert getattr(pair, side).score == summary["accuracy"] and 0 <= summary["accuracy"] <= 1
    assert found.measure.name == "accuracy" and "accuracy" in str(found) and "bits per byte" not in str(found)
    assert mean_curve(found, "b")[1][-1] == pair.b.score


@pytest.mark.slow
def test_a_sweep_runs_on_labels(labelled: dict[str, object], tmp_path: Path):
    sweep = {"base": "tune-classify", "set": labelled, "axes": {"grid": {"optim.lr": [1e-4, 1e-3]}}}
    file = tmp_path / "rates.yaml"
    file.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    rows = run_sweep(file, tmp_path / "out", jobs=1).rows
    assert [row["status"] for row in rows] == ["done", "done"], [row["error"] for row in rows]
    assert all(0 <= row["accuracy"] <= 1 and row["loss"] > 0 and row["bits_per_byte"] is None for row in rows)


@pytest.mark.slow
def test_preferences_are_compared_by_accuracy(fields: dict[str, object], tmp_path: Path):
    file = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n}"} for n in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {**fields, "examples.source": str(file), "examples.format": "preference"}
    a, b = load_recipe("tune-chat", given), load_recipe("tune-chat", {**given, "objective.beta": 0.3})
    found = compare(a, b, tmp_path / "out", seeds=1)
    for side in ("a", "b"):
        summary = json.loads((tmp_path / "out" / "seed-0" / side / "summary.json").read_text(encoding="utf-8"))
        assert getattr(found.pairs[0], side).score == summary["accuracy"]
    assert found.measure.name == "accuracy" and "bits per byte" not in str(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels.target": "number"}, "A predicts a class and B a number"),
        ({"labels.source": "others.jsonl"}, r"hold out different text \(labels.source: .* → .*others.jsonl\)"),
    ],
)
def test_labels_that_cannot_be_compared(
    changes: dict[str, str], message: str, labelled: dict[str, object], tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{n} or {n + 1}", "label": ("even", "odd")[n % 2]} for n in range(60)]
    Path("others.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    a, b = load_recipe("tune-classify", labelled), load_recipe("tune-classify", {**labelled, **changes})
    with pytest.raises(ConfigError, match=message):
        compare(a, b, tmp_path / "out", seeds=1)


def test_shapes_are_not_derived_for_a_model_that_there_is(fields: dict[str, object], tmp_path: Path):
    axes = {"isoflop": {"budgets": ["1e10flop"], "sizes": ["12.3k"]}}
    file = tmp_path / "sweep.yaml"
    given = {name: value for name, value in fields.items() if name != "budget"}
    file.write_text(yaml.safe_dump({"base": "tune-chat", "set": given, "axes": axes}), encoding="utf-8")
    with pytest.raises(ConfigError, match="starts from a model that there is"):
        read_sweep(file, {})
