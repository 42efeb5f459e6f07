"""The protocol on tasks made up: GLUE's forms of files, what is not GLUE, seeds that are not run again."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import cramjax.glue.run as protocol
from cramjax.config import ModelConfig, RunConfig, TokenizerConfig
from cramjax.data.tokenizer import make_tokenizer
from cramjax.errors import ConfigError, DataError, RunError
from cramjax.evaluation.results import Score
from cramjax.glue import GLUE, SeedScores, Tuned, load_tasks, run_protocol
from cramjax.glue.protocol import ENTRIES, PUBLISHED
from cramjax.glue.rows import rows_of
from cramjax.glue.run import config_of
from cramjax.language_model import LanguageModel, load_model
from cramjax.model import make_model
from cramjax.recipes import load_recipe, to_yaml


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def test_published_averages_are_those_of_the_paper() -> None:
    averages = {name: round(float(np.mean(values)), 1) for name, values in PUBLISHED.items()}
    assert len(ENTRIES) == 9
    assert [averages[name] for name in PUBLISHED] == pytest.approx([80.9, 45.5, 85.1, 78.6], abs=0.11)


def test_files_of_the_glue_download(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        write(tmp_path / f"CoLA/{split}.tsv", 'gj04\t1\t\tHe said "no.', "gj04\t0\t*\tHim say no.")
        write(
            tmp_path / f"QQP/{split}.tsv",
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            "1\t1\t2\tWhy?\tWhat for?\t1",
            "2\t3\t4\tWhy not",
            "3\t5\t6\t\tWho?\t0",
        )
        write(tmp_path / f"STS-B/{split}.tsv", "sentence1\tsentence2\tscore", "A cat.\tA dog.\t2.5")
    for name in ("train", "dev_matched", "dev_mismatched"):
        lines = ["sentence1\tsentence2\tgold_label", "It is.\tIt is not.\tcontradiction", "a\tb\t-"]
        write(tmp_path / f"MNLI/{name}.tsv", *lines)
    tasks = load_tasks(tmp_path)
    assert set(tasks) == {"cola", "qqp", "stsb", "mnli"}
    cola = rows_of("cola", tasks["cola"], tmp_path, tmp_path / "out")
    assert read(cola.train) == [
        {"text": 'He said "no.', "label": "acceptable"},
        {"text": "Him say no.", "label": "unacceptable"},
    ]
    qqp = rows_of("qqp", tasks["qqp"], tmp_path, tmp_path / "out")
    assert (read(qqp.train), qqp.without_text, qqp.without_label, qqp.pairs) == (
        [{"text": "Why?", "pair": "What for?", "label": "duplicate"}],
        4,
        0,
        True,
    )
    assert read(rows_of("stsb", tasks["stsb"], tmp_path, tmp_path / "out").train)[0]["label"] == 2.5
    mnli = rows_of("mnli", tasks["mnli"], tmp_path, tmp_path / "out")
    assert set(mnli.validation) == {"mnli", "mnli-mm"} and (mnli.without_text, mnli.without_label) == (0, 3)


def test_files_of_hugging_face(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        row = {"sentence1": "a b", "sentence2": "c", "label": 1, "idx": 0}
        write(tmp_path / f"rte/{split}.jsonl", json.dumps(row))
    found = rows_of("rte", GLUE["rte"], tmp_path, tmp_path / "out")
    assert read(found.validation["rte"]) == [{"text": "a b", "pair": "c", "label": "not_entailment"}]
    write(tmp_path / "rte/train.jsonl", json.dumps({"sentence1": "a", "sentence2": "c", "label": -1}))
    with pytest.raises(DataError, match="line 1: label -1 is not one of entailment, not_entailment"):
        rows_of("rte", GLUE["rte"], tmp_path, tmp_path / "out")
    write(tmp_path / "rte/train.jsonl", json.dumps({"premise": "a", "sentence2": "c", "label": 1}))
    with pytest.raises(DataError, match="line 1: no field 'sentence1'. It has premise, sentence2, label"):
        rows_of("rte", GLUE["rte"], tmp_path, tmp_path / "out")


def test_tasks_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no task: neither GLUE's directories"):
        load_tasks(tmp_path)
    write(tmp_path / "mine/task.yaml", "metric: pearson")
    with pytest.raises(ConfigError, match="metric pearson is not of target class"):
        load_tasks(tmp_path)
    write(tmp_path / "mine/task.yaml", "metric: f1")
    with pytest.raises(DataError, match="there is no task 'mime' in .*; did you mean mine"):
        load_tasks(tmp_path, ["mime"])
    write(tmp_path / "CoLA/train.tsv", "gj04\t1\t\tYes.")
    with pytest.raises(ConfigError, match="tasks of its own .mine. and GLUE's .cola."):
        load_tasks(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a task that it can learn from one letter, and one of numbers."""
    path = tmp_path_factory.mktemp("protocol")
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes"), [])
    config = ModelConfig(layers=1, width=16, heads=2, mlp=32)
    model = make_model(
        config, vocab_size=tokenizer.vocab_size, sequence_length=16, causal=False, separator_id=tokenizer.separator_id
    )
    LanguageModel(path, "encoder", tokenizer, 16, model, model.init(jax.random.key(0))).save(path / "model")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 12)):
        texts = ["".join(rng.choice(list("abc"), 6)) for _ in range(count)]
        write(path / f"tasks/letter/{split}.jsonl", *(json.dumps({"s": t, "label": "a" in t[:2]}) for t in texts))
        rows = [json.dumps({"text": t, "pair": t[::-1], "label": t.count("a") / 2}) for t in texts]
        write(path / f"tasks/count/{split}.jsonl", *rows)
    write(path / "tasks/letter/task.yaml", "fields: {text: s}\nmetric: f1")
    write(path / "tasks/count/task.yaml", "metric: spearman\ntarget: number")
    return path


TINY = ["labels.head_width=8", "data.sequence_length=16", "batch.size=8", "train.compute_dtype=float32"]


def test_rows_are_pairs_where_they_have_one(data: Path) -> None:
    """The fields need not say so."""
    base = load_recipe("tune-classify", [*TINY, f"start_from={data / 'model'}"])
    tasks = load_tasks(data / "tasks")
    for name, pairs in (("count", True), ("letter", False)):
        config = config_of(base, tasks[name], rows_of(name, tasks[name], data, data), 1)
        assert config.labels is not None and config.model.classifier is not None
        assert config.labels.pairs is pairs and config.model.classifier.pairs is pairs


class Stopped(Exception):
    """A run that is interrupted as soon as it has begun."""


@pytest.fixture
def begun(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, Path]]:
    """Runs the protocol on a copy of the data until its first run begins: how that does, and in which directory."""
    shutil.copytree(data / "tasks", tmp_path / "tasks")
    shutil.copytree(data / "model", tmp_path / "model")
    found: list[tuple[str, Path]] = []

    def train(config: RunConfig, directory: Path, **_: Any) -> None:
        write(directory / "config.yaml", to_yaml(config))
        found.append(("train", directory))
        raise Stopped

    def resume(directory: Path, **_: Any) -> None:
        found.append(("resume", directory))
        raise Stopped

    monkeypatch.setattr(protocol, "train", train)
    monkeypatch.setattr(protocol, "resume", resume)

    def run(*overrides: str) -> tuple[str, Path]:
        options: dict[str, Any] = {"tasks": ["letter"], "seeds": 1, "epochs": 1, "overrides": [*TINY, *overrides]}
        with pytest.raises(Stopped):
            run_protocol(tmp_path / "model", tmp_path / "tasks", tmp_path / "out", **options)
        return found.pop()

    return run


def test_an_interrupted_seed_goes_on_with_the_same_settings_only(begun: Callable[..., tuple[str, Path]]) -> None:
    how, first = begun()
    assert how == "train" and begun() == ("resume", first)
    how, other = begun("optim.lr=1e-3")
    assert how == "train" and not first.exists()
    assert begun() == ("train", first) and not other.exists()


def test_changed_rows_are_other_rows_and_a_changed_model_another(
    begun: Callable[..., tuple[str, Path]], tmp_path: Path
) -> None:
    begun()
    assert begun()[0] == "resume"
    for split in ("train", "validation"):
        file = tmp_path / f"tasks/letter/{split}.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()
        write(file, *lines[1:], lines[0])
        assert begun()[0] == "train" and begun()[0] == "resume"
    model = load_model(tmp_path / "model")
    further = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf + 1, model.params))
    shutil.rmtree(tmp_path / "model")
    further.save(tmp_path / "model")
    assert begun()[0] == "train" and begun()[0] == "resume"


@pytest.mark.parametrize(
    ("metric", "labels", "message"),
    [
        ("macro_f1", "", "'macro_f1' is no score of labels that are 2 classes: choose of accuracy, f1, matthews"),
        ("f1", "[a, b, c]", "'f1' is no score of labels that are 3 classes: choose of accuracy, macro_f1, matthews"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_before_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, labels: str, message: str
) -> None:
    """Also where it is the last task's."""
    shutil.copytree(data / "tasks/count", tmp_path / "tasks/count")
    rows = [json.dumps({"text": text, "label": text[0]}) for text in ("a b", "b c", "a c", "b b")]
    for split in ("train", "validation"):
        write(tmp_path / f"tasks/other/{split}.jsonl", *rows[:: 1 if split == "train" else 3])
    write(tmp_path / "tasks/other/task.yaml", f"metric: {metric}", *([f"labels: {labels}"] if labels else []))
    monkeypatch.setattr(protocol, "train", lambda *_, **__: pytest.fail("it was to be refused before training"))
    with pytest.raises(ConfigError, match=f"^metric of task other: {message}.$"):
        run_protocol(data / "model", tmp_path / "tasks", tmp_path / "out", overrides=TINY)


def test_what_is_not_crammings_is_said(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = Score("f1", 0.5, None)
    monkeypatch.setattr(protocol, "_seed", lambda _, seed, *__: SeedScores(seed, {"letter": score}, 1, 1.0))

    def run(**options: Any) -> Tuned:
        return run_protocol(data / "model", data / "tasks", tmp_path, tasks=["letter"], **options)

    assert run().notes == ()
    made = run(seeds=2, epochs=1.5, overrides=["optim.lr=1e-3", "batch.size=8", "adapter.rank=2"])
    assert made.notes == (
        "not Cramming's protocol: optim.lr 0.001, where it has 4e-05",
        "not Cramming's protocol: batch.size 8, where it has 16",
        "not Cramming's protocol: adapter given, where it has none",
        "not Cramming's protocol: epochs 1.5, where it has 5",
        "not Cramming's protocol: seeds 2, where it has 5",
    )
    assert made.json()["notes"] == list(made.notes)
    assert all(note in str(made) for note in made.notes)
    with pytest.raises(ConfigError, match="^budget is decided by the tasks, .*, got '9steps': leave it out.$"):
        run(overrides=["budget=9steps"])


@pytest.mark.slow
def test_seeds_medians_and_what_is_done_already(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"seeds": 2, "epochs": 1, "overrides": TINY}
    made = run_protocol(data / "model", data / "tasks", data / "out", **options)
    assert [(r.entry, r.metric, r.items, r.seeds) for r in made.results] == [
        ("count", "spearman", 12, (0, 1)),
        ("letter", "f1", 12, (0, 1)),
    ]
    assert made.average == pytest.approx(np.mean([np.median([s.value for s in r.scores]) for r in made.results]))
    assert not made.glue and not made.complete and made.json()["published_not_measured_here"] == {}
    assert "not GLUE" in str(made) and "Published" not in str(made)
    assert json.loads((data / "out/letter/seed-0.json").read_text(encoding="utf-8"))["steps"] == 3  # 24 rows, 8 a step
    monkeypatch.setattr(protocol, "train", lambda *_, **__: pytest.fail("a seed that is done is not run again"))
    again = run_protocol(data / "model", data / "tasks", data / "out", **options)
    assert again.json() == made.json()
    with pytest.raises(RunError, match="is of another model, recipe or data"):
        run_protocol(data / "model", data / "tasks", data / "out", **options | {"epochs": 2})
    rows = data / "tasks/letter/validation.jsonl"
    write(rows, *rows.read_text(encoding="utf-8").splitlines()[::-1])
    with pytest.raises(RunError, match="is of another model, recipe or data"):
        run_protocol(data / "model", data / "tasks", data / "out", **options | {"tasks": ["letter"]})
