"""Scores of labels against scipy and closed forms, and what a command says of them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

from cramjax.classifier import ClassifierConfig
from cramjax.config import ModelConfig, TokenizerConfig
from cramjax.data.examples import LabelsConfig, labelled_rows
from cramjax.data.tokenizer import make_tokenizer
from cramjax.errors import ConfigError, RunError
from cramjax.evaluation.bootstrap import interval_of, interval_of_difference, share
from cramjax.evaluation.labels import Predictions, compare_on_labels, evaluate_labels, metrics_of
from cramjax.language_model import LanguageModel
from cramjax.language_model.directory import save_model
from cramjax.model import make_model
from cramjax.recipes import load_recipe
from cramjax.training import train

RNG = np.random.default_rng(3)


def classes_of(count: int, names: tuple[str, ...]) -> Predictions:
    outputs = RNG.normal(size=(count, len(names)))
    return Predictions(RNG.integers(0, len(names), count).astype(float), outputs, names)


def test_scores_of_two_classes_are_those_of_their_table() -> None:
    made = classes_of(50, ("no", "yes"))
    guess = made.outputs[:, 1] > made.outputs[:, 0]
    tp, fp = ((made.given == one) & guess for one in (1, 0))
    fn, tn = ((made.given == one) & ~guess for one in (1, 0))
    tp, fp, fn, tn = (int(part.sum()) for part in (tp, fp, fn, tn))
    assert made.score("accuracy") == pytest.approx((tp + tn) / 50)
    assert made.score("f1") == pytest.approx(2 * tp / (2 * tp + fp + fn))
    below = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert made.score("matthews") == pytest.approx((tp * tn - fp * fn) / below)


def test_scores_of_more_classes() -> None:
    made = classes_of(60, ("a", "b", "c"))
    table = np.zeros((3, 3))
    for given, guess in zip(made.given.astype(int), made.outputs.argmax(1), strict=True):
        table[given, guess] += 1
    each = [2 * table[n, n] / (table[n].sum() + table[:, n].sum()) for n in range(3)]
    assert made.score("macro_f1") == pytest.approx(np.mean(each))
    right, total, rows, columns = np.trace(table), table.sum(), table.sum(1), table.sum(0)  # Gorodkin 2004, counts
    above = right * total - rows @ columns
    below = np.sqrt((total**2 - rows @ rows) * (total**2 - columns @ columns))
    assert made.score("matthews") == pytest.approx(above / below)


def test_correlations_are_scipys() -> None:
    given = np.round(RNG.normal(size=40), 1)  # with ties
    made = Predictions(given, np.round(given + RNG.normal(size=40), 1)[:, None], ())
    assert made.score("pearson") == pytest.approx(stats.pearsonr(given, made.outputs[:, 0]).statistic)
    assert made.score("spearman") == pytest.approx(stats.spearmanr(given, made.outputs[:, 0]).statistic)
    assert made.score("mean_squared_error") == pytest.approx(np.mean((given - made.outputs[:, 0]) ** 2))


def test_what_is_undefined_is_0_and_what_is_unknown_is_refused() -> None:
    same = Predictions(np.array([0.0, 1.0, 1.0]), np.array([[1.0, 0.0]] * 3), ("no", "yes"))
    assert (same.score("matthews"), same.score("f1")) == (0.0, 0.0)
    with pytest.raises(ConfigError, match="'pearson' is no score of labels that are 2 classes: choose of accuracy"):
        same.score("pearson")
    assert metrics_of(3)[1] == "macro_f1"


def test_the_interval_of_a_correlation_is_about_fishers() -> None:
    given = RNG.normal(size=400)
    other = 0.6 * given + 0.8 * RNG.normal(size=400)
    found = interval_of(lambda a, b: np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]),
                        given, other, seed=0)  # fmt: skip
    z, width = np.arctanh(np.corrcoef(given, other)[0, 1]), 1.96 / np.sqrt(397)
    assert found is not None
    np.testing.assert_allclose(found, np.tanh([z - width, z + width]), atol=0.03)


def test_the_interval_of_a_difference_is_of_the_same_items_for_both() -> None:
    """Of shares it is the one that measures of tasks have; a model beside itself differs in nothing."""
    given = RNG.integers(0, 2, 40).astype(float)
    a, b = (np.where(RNG.random(40) < share, given, 1 - given) for share in (0.6, 0.8))

    def accuracy(given: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        return (given == predicted).mean(-1)

    first, second = (share("accuracy", list(given == one)) for one in (a, b))
    assert interval_of_difference(accuracy, given, a, b, seed=1) == pytest.approx(first.difference(second, 1)[1])
    assert interval_of_difference(accuracy, given, a, a, seed=1) == (0.0, 0.0)
    assert interval_of_difference(accuracy, given[:1], a[:1], b[:1], seed=1) is None


@pytest.mark.slow
def test_two_models_are_compared_on_the_same_labelled_texts(
    masked: LanguageModel, cache_directory: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"{n} and {n + 1}", "label": ("even", "odd")[n % 2]} for n in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    save_model(masked, tmp_path / "model")
    given = {"model.from": str(tmp_path / "model"), "labels.source": str(data), "budget": "2steps"}
    given |= {"data.sequence_length": 32, "train.data_parallel": 1}
    a, b = (train(load_recipe("tune-classify", {**given, "seed": n}), tmp_path / f"run{n}") for n in (0, 1))
    found = compare_on_labels(a, b, str(data))
    assert found.a.json()["tasks"] == {
        name: task | {"settings": found.a.json()["tasks"][name]["settings"]}
        for name, task in evaluate_labels(a, str(data)).json()["tasks"].items()
    }
    for each in found.differences:
        first, second = (scores["rows.jsonl"][each.name].value for scores in (found.a, found.b))
        assert each.difference == pytest.approx(second - first) and each.interval is not None
    assert [each.name for each in found.differences] == ["accuracy", "f1", "matthews"]
    assert "interval" in found.differences[0].verdict and "rows.jsonl" in str(found)
    numbers = train(load_recipe("tune-classify", {**given, **_numbers(tmp_path)}), tmp_path / "numbers")
    with pytest.raises(RunError, match=r"give different labels \(even, odd and numbers\)"):
        compare_on_labels(a, numbers, str(data))


def _numbers(folder: Path) -> dict[str, str]:
    rows = [{"text": f"{n} and {n + 1}", "label": n / 40} for n in range(40)]
    (folder / "numbers.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"labels.source": str(folder / "numbers.jsonl"), "labels.target": "number"}


TOKENIZER = make_tokenizer(TokenizerConfig(kind="bytes"), [])


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Pairs, with a column for each text that no model is told of."""
    file = tmp_path / "rows.jsonl"
    lines = [{"text": f"a{n}", "pair": f"b{n}", "other": f"c{n}", "label": ("no", "yes")[n % 2]} for n in range(4)]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(file)


def saved(path: Path, pairs: bool | None) -> Path:
    """A model that gives labels, as it is tuned on pairs, or single texts, or before that was kept."""
    config = ModelConfig(layers=1, width=8, heads=1, mlp=8, classifier=ClassifierConfig(("no", "yes"), pairs=pairs))
    sizes = {"vocab_size": TOKENIZER.vocab_size, "sequence_length": 16}
    model = make_model(config, **sizes, causal=False, separator_id=TOKENIZER.separator_id)
    out = LanguageModel(path, "labels", TOKENIZER, 16, model, model.init(jax.random.key(0))).save(path / "model")
    if pairs is None:  # as an earlier version wrote it
        text = (out / "model.yaml").read_text(encoding="utf-8")
        assert text.count("    pairs: null\n") == 1
        (out / "model.yaml").write_text(text.replace("    pairs: null\n", ""), encoding="utf-8")
    return out


def test_a_saved_model_is_scored_on_what_it_was_tuned_on(tmp_path: Path, rows: str) -> None:
    def read(pairs: bool, **fields: str) -> str:
        config = LabelsConfig(rows, names=("no", "yes"), pairs=pairs, fields=fields)
        return labelled_rows(config, TOKENIZER, 16).identity

    def scored(path: Path, fields: dict[str, str] | None = None) -> str:
        return evaluate_labels(path, rows, fields=fields).tasks[0].settings["rows"]

    assert read(True) != read(False)
    pairs, single, old = (saved(tmp_path / str(kind), kind) for kind in (True, False, None))
    assert (scored(pairs), scored(single), scored(old)) == (read(True), read(False), read(True))
    assert scored(pairs, {"pair": "other"}) == scored(old, {"pair": "other"}) == read(True, pair="other")
    with pytest.raises(
        ConfigError, match="fields names a pair, 'other', and labels.pairs is false, as of a model tuned"
    ):
        scored(single, {"pair": "other"})
