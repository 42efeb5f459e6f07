"""The command line: what it prints, what it leaves, and how it takes a user's mistakes."""

import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from cramjax import cli
from cramjax.config import RunConfig
from cramjax.errors import ModelError, RunInterruptedError
from cramjax.recipes import from_yaml, load_recipe
from cramjax.training.parts import resolved

_TINY = """
budget: 6steps
data: {sequence_length: 32, validation_fraction: 0.2}
tokenizer: {vocab_size: 300}
model: {layers: 1, width: 32, heads: 2, mlp: 64}
batch: {size: 8}
evaluate: {points: 2, tokens: 1024, batch: 8}
checkpoint: {points: 2}
train: {data_parallel: 1}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A YAML file that trains in a second."""
    file = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    file.write_text(_TINY.replace("data: {", f"data: {{source: '{corpus}/*.txt', "), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made by the command line."""
    out = tmp_path_factory.mktemp("runs") / "causal"
    assert cli.main(["train", str(recipe), "--out", str(out), "--seed=3"]) == 0
    return out


def _error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence a mistake leaves on standard error."""
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").strip()


COMMANDS = (
    "train",
    "compress",
    "generate",
    "embed",
    "evaluate",
    "fill-mask",
    "serve",
    "check",
    "plan",
    "sweep",
    "compare",
    "fit",
    "advise",
)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for command in COMMANDS:
        assert f"cramjax {command} " in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_needs_no_jax(command: str):
    program = (
        "import sys; from cramjax.cli import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit as stop: sys.exit(stop.code or 'jax' in sys.modules or 'datasets' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"cramjax {command}" in result.stdout


def test_the_package_runs_as_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "cramjax", "train", "quickstart", "--budget=nonsense"], capture_output=True, text=True
    )
    assert result.returncode == 2 and "nonsense" in result.stderr and "Traceback" not in result.stderr


def test_help_of_train_explains_every_field(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    config = RunConfig()
    for group in vars(config):
        inner = getattr(config, group)
        for name in [group] if isinstance(inner, str | int | None) else [f"{group}.{field}" for field in vars(inner)]:
            assert re.search(rf"--{name}[ ,]\S", text), name
    assert "Cramming's filter: drop a document that the tokenizer compresses worse than this" in text


def test_print_config_is_a_recipe_with_the_overrides(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "quickstart", "--print_config", "--optim.lr", "2e-3", "--budget=10min"]) == 0
    printed = from_yaml(capsys.readouterr().out)
    assert printed == load_recipe("quickstart", {"optim.lr": 2e-3, "budget": "10min"})


def test_options_may_come_before_the_recipe(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "--optim.lr", "2e-3", "quickstart", "--print_config"]) == 0
    assert from_yaml(capsys.readouterr().out) == load_recipe("quickstart", {"optim.lr": 2e-3})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["trian"],
            "there is no command 'trian'. Commands: train, tune, merge, compress, generate, fill-mask, embed,",
        ),
        (["train"], "cramjax train needs a recipe: crammed-bert,"),
        (["train", "quickstrat"], "did you mean quickstart?"),
        (["train", "quickstart", "--optim.lrr=3"], "unknown option --optim.lrr; did you mean --optim.lr?"),
        (["train", "quickstart", "--ot=x"], "unknown option --ot; did you mean --out?"),
        (["train", "quickstart", "--optim.lr", "fast"], "--optim.lr must be a number, got 'fast'."),
        (["train", "quickstart", "--budget=300"], "budget '300' has no unit"),
        (["train", "quickstart", "again"], "unexpected argument 'again'. See `cramjax train --help`."),
        (["train", "quickstart", "--out"], "argument --out: expected one argument"),
        (["train", "--resume", "x", "--optim.lr=1"], "a resumed run keeps its own configuration and directory"),
        (["train", "--resume", "x", "--out=y"], "a resumed run keeps its own configuration and directory"),
        (["train", "--resume", "no-such-run"], "no-such-run is not a run directory (it does not exist)"),
        (["train", "quickstart", "--data.source=no-such-file.txt"], "no-such-file.txt"),
        (["generate"], "the following arguments are required: RUN."),
        (["generate", "x", "--beams=2", "--temperature=0.5"], "--beams draws nothing, and --temperature says how to"),
        (["generate", "x", "a", "--prompts=b.txt"], "--prompts FILE and texts after MODEL exclude each other"),
        (["generate", "no-such-run"], "no-such-run is not a run directory"),
        (["generate", "x", "--top_k=many"], "argument --top_k: invalid int value: 'many'"),
        (["evaluate", "no-such-run"], "no-such-run is not a run directory"),
        (["fill-mask", "x"], "the following arguments are required: TEXT"),
        (["embed", "x", "--texts=a.txt"], "the following arguments are required: --out"),
        (["embed", "x", "--texts=a.txt", "--out=a.txt"], "--out must be a .npy file, got 'a.txt'."),
        (["embed", "x", "--texts=no-such.jsonl", "--out=a.npy"], "no-such.jsonl"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    assert message in _error(capsys, *words)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_an_interrupted_run_exits_as_a_signal_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(words: object) -> None:
        raise RunInterruptedError("SIGTERM: saved. Continue with: cramjax train --resume x", 15)

    monkeypatch.setitem(cli._COMMANDS, "train", interrupted)
    assert cli.main(["train", "quickstart"]) == 128 + 15
    assert capsys.readouterr().err == "SIGTERM: saved. Continue with: cramjax train --resume x\n"


def test_a_run_lands_under_runs_named_by_recipe_and_time(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[Path] = []
    monkeypatch.setattr(import_module("cramjax.training"), "train", lambda config, out, display: made.append(out))
    monkeypatch.setattr(import_module("cramjax.finish"), "finish", lambda run, display: None)
    assert cli.main(["train", str(recipe)]) == 0
    assert re.fullmatch(r"runs/tiny-\d{8}-\d{6}", made[0].as_posix())


@pytest.mark.slow
def test_train_leaves_a_run_directory_with_the_resolved_configuration(run: Path, recipe: Path):
    assert from_yaml((run / "config.yaml").read_text(encoding="utf-8")) == resolved(load_recipe(recipe, {"seed": 3}))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 6 and summary["final_fraction"] == 1
    assert (run / "report.html").stat().st_size > 0


@pytest.mark.slow
def test_an_existing_directory_is_not_overwritten(run: Path, recipe: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    message = _error(capsys, "train", str(recipe), "--out", str(run))
    assert f"{run} exists already" in message and "--resume" in message
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.slow
def test_a_run_whose_model_could_not_be_written_is_finished_by_resuming(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "model")
    (copy / "report.html").unlink()

    def full(*_: object, **__: object) -> None:
        raise ModelError("no space is left on the device")

    with monkeypatch.context() as patched:
        patched.setattr(import_module("cramjax.finish"), "save_model", full)
        assert cli.main(["train", "--resume", str(copy)]) == 2
    assert cli.main(["train", "--resume", str(copy)]) == 0
    assert (copy / "model" / "model.yaml").is_file() and (copy / "report.html").is_file()


@pytest.mark.slow
def test_a_finished_run_resumes_only_with_a_larger_budget(run: Path, capsys: pytest.CaptureFixture[str]):
    assert "has spent its budget" in _error(capsys, "train", "--resume", str(run))
    assert cli.main(["train", "--resume", str(run), "--print_config"]) == 0
    assert capsys.readouterr().out == (run / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_generate_continues_each_prompt_and_a_seed_repeats_it(run: Path, capsys: pytest.CaptureFixture[str]):
    words = [
        "generate",
        str(run),
        "the stack",
        "every token",
        "--max_tokens=12",
        "--seed=7",
        "--top_k=50",
        "--top_p=0.9",
    ]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert first.startswith("the stack") and "\n\nevery token" in first
    assert cli.main(words) == 0
    assert capsys.readouterr().out == first


@pytest.mark.slow
def test_evaluate_prints_scores_and_writes_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text, out = tmp_path / "text.txt", tmp_path / "scores.json"
    text.write_text("the stack walks block by block\n" * 20, encoding="utf-8")
    assert cli.main(["evaluate", str(run), "--text", str(text), "--json", str(out)]) == 0
    scores = json.loads(out.read_text(encoding="utf-8"))
    assert scores["bytes"] == len(text.read_bytes())
    assert 0 < scores["bits_per_byte"] < 10
    assert f"{scores['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "missing.txt" in _error(capsys, "evaluate", str(run), "--text", "missing.txt")
    assert cli.main(["evaluate", str(run), "--json", str(tmp_path / "no" / "such" / "dir.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.slow
def test_a_causal_model_fills_no_masks(run: Path, capsys: pytest.CaptureFixture[str]):
    assert "is a causal model" in _error(capsys, "fill-mask", str(run), "the [MASK] walks")


@pytest.mark.slow
def test_fill_mask_ranks_tokens(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "masked"
    words = [
        "train",
        str(recipe),
        "--out",
        str(out),
        "--objective.kind=masked",
        "--evaluate.samples=['the [MASK] walks']",
    ]
    assert cli.main(words) == 0
    capsys.readouterr()
    assert cli.main(["fill-mask", str(out), "the [MASK] walks block by [MASK]", "--top=3"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("the [MASK] walks block by [MASK]\n")
    assert len(re.findall(r"\d%", printed)) == 6
    assert "is a masked model" in _error(capsys, "generate", str(out), "the")
