"""`cramjax evaluate --tasks`: what it prints and writes, and how it takes mistakes."""

import json
from pathlib import Path

import pytest

from cramjax import cli
from cramjax.evaluation import evaluate_tasks
from cramjax.language_model import LanguageModel

from .helpers import MakeModel, write_rows


@pytest.fixture(scope="module")
def path(causal: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory."""
    return causal.save(tmp_path_factory.mktemp("models") / "mine")


def test_scores_are_printed_and_written(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "scores.json"
    words = ["evaluate", str(path), "--tasks", "agreement", "summaries", "--limit", "9", "--json", str(out)]
    assert cli.main(words) == 0
    printed = capsys.readouterr()
    scores = evaluate_tasks(path, ["agreement", "summaries"], limit=9)
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(json.dumps(scores.json()))
    assert printed.out.rstrip("\n") == str(scores)
    assert f"{path}: agreement …" in printed.err.replace("\n", "")


def test_two_models_are_told_apart_or_not(
    path: Path, model_of: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other, out = model_of(seed=3).save(tmp_path / "other"), tmp_path / "scores.json"
    words = ["evaluate", str(path), "--tasks", "agreement", "--limit=9", "--against", str(other), "--json", str(out)]
    assert cli.main(words) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert [written[side]["model"] for side in "ab"] == [str(path), str(other)]
    assert written["differences"][0]["verdict"] in capsys.readouterr().out


def test_data_is_given_by_name_or_alone(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pairs = [{"sentence_good": "The kings work.", "sentence_bad": "The kings works."}]
    file = str(write_rows(tmp_path / "a=b.jsonl", pairs))
    printed = []
    for data in (file, f"blimp={file}"):
        assert cli.main(["evaluate", str(path), "--tasks", "blimp", "--data", data]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "3"], "--limit is of tasks: give --tasks too"),
        (["--against", "x"], "--against is of tasks"),
        (["--tasks", "agreement", "--text", "x"], "--text and --tasks exclude each other"),
        (["--tasks", "agreemnt"], "there is no task 'agreemnt'; did you mean agreement?"),
        (["--tasks", "blimp", "piqa", "--data", "x.jsonl"], "--data takes TASK=FILE, where TASK is one of blimp, piqa"),
        (["--tasks", "blimp", "--data", "none.jsonl"], "'none.jsonl': no such file or directory"),
        (["--tasks", "agreement", "--limit", "0"], "limit must be 1 or more, got 0"),
        (["--tasks", "agreement", "--json", "/no/such/place.json"], "cannot write /no/such/place.json"),
        (["--tasks", "agreement", "--against", "no-such-run"], "no-such-run is not a run directory"),
    ],
)
def test_mistakes(path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["evaluate", str(path), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert message in printed.err
