"""`cramjax tune` and `cramjax merge`: what is typed wrong is one sentence."""

from pathlib import Path

import pytest

from cramjax import cli


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tune"], "cramjax tune needs a model and a recipe: cramjax tune MODEL RECIPE. Recipes: qlora-13b, qlora-7b"),
        (
            ["tune", "nothing", "tune-chat", "--examples.fromat=chat"],
            "examples.fromat; did you mean --examples.format?",
        ),
        (["tune", "model"], "cramjax tune needs a model and a recipe"),
        (["tune", "model", "--budget=1min"], "cramjax tune needs a model and a recipe"),
        (["tune", "nothing", "tune-chat"], "nothing is not a run directory (it does not exist)"),
        (["tune", "nothing", "tune-chatt"], "there is no recipe 'tune-chatt'; did you mean tune-chat?"),
        (["tune", "nothing", "tune-chat", "--adapter.rank=0"], "adapter.rank must be at least 1, got 0"),
        (["tune", "nothing", "tune-chat", "--adapter.kind=lorra"], "did you mean lora?"),
        (["tune", "nothing", "tune-chat", "--model.layers=3"], "model.layers: the architecture is that of nothing"),
        (["tune", "--resume", "run", "--adapter.rank=4"], "give `cramjax tune --resume run`"),
        (["train", "qlora-7b"], "this recipe fine-tunes a model, and none is given: cramjax tune MODEL RECIPE"),
        (["merge", "nothing", "--out", "made"], "nothing is not a run directory"),
        (["merge", "nothing"], "the following arguments are required: --out"),
        (
            ["glue", "nothing", "--data", ".", "--out", "o", "--seeds", "0"],
            "--seeds and --epochs must be above 0, got 0",
        ),
        (["glue", "nothing", "--data", "nowhere", "--out", "o"], "nowhere is not a directory"),
        (["evaluate", "nothing", "--labels", "--tasks", "t"], "--labels excludes --text and --tasks"),
        (
            ["evaluate", "nothing", "--labels", "f", "--limit", "3"],
            "--limit is of tasks, and --labels names its own files",
        ),
        (["evaluate", "nothing", "--labels", "--against", "b"], "name their files (--labels FILE)"),
        (["evaluate", "nothing", "--fields", "text=a"], "--fields is of labelled rows: give --labels too"),
        (["train", "quickstart", "--model.from"], "--model.from needs a value"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
