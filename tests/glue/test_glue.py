"""The protocol on tasks made up: GLUE's forms of files, what is not GLUE, seeds that are not run again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cramjax.glue.run as protocol
from cramjax.config import ModelConfig, TokenizerConfig
from cramjax.data.tokenizer import make_tokenizer
from cramjax.errors import ConfigError, DataError, RunError
from cramjax.glue import GLUE, load_tasks, run_protocol
from cramjax.glue.protocol import ENTRIES, PUBLISHED
from cramjax.glue.rows import rows_of
from cramjax.language_model import LanguageModel
from cramjax.model import make_model


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
    assert (read(qqp.train), qqp.skipped, qqp.pairs) == (
        [{"text": "Why?", "pair": "What for?", "label": "duplicate"}],
        4,
        True,
    )
    assert read(rows_of("stsb", tasks["stsb"], tmp_path, tmp_path / "out").train)[0]["label"] == 2.5
    mnli = rows_of("mnli", tasks["mnli"], tmp_path, tmp_path / "out")
    assert set(mnli.validation) == {"mnli", "mnli-mm"} and mnli.skipped == 3


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
    import jax

    LanguageModel(path, "encoder", tokenizer, 16, model, model.init(jax.random.key(0))).save(path / "model")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 12)):
        texts = ["".join(rng.choice(list("abc"), 6)) for _ in range(count)]
        write(path / f"tasks/letter/{split}.jsonl", *(json.dumps({"s": t, "label": "a" in t[:2]}) for t in texts))
        rows = [json.dumps({"text": t, "pair": t[::-1], "label": t.count("a") / 2}) for t in texts]
        write(path / f"tasks/count/{split}.jsonl", *rows)
    write(path / "tasks/letter/task.yaml", "fields: {text: s}\nmetric: f1")
    write(path / "tasks/count/task.yaml", "fields: {pair: pair}\nmetric: spearman\ntarget: number")
    return path


TINY = ["labels.head_width=8", "data.sequence_length=16", "batch.size=8", "train.compute_dtype=float32"]


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
