"""A budget becomes a run: the size, tokens and bits per byte that the law says, in a recipe that loads."""

import json
import math
from pathlib import Path

import pytest

import cramjax
from cramjax import cli
from cramjax.config import OptimConfig
from cramjax.model import count_parameters
from cramjax.recipes import load_recipe
from cramjax.scaling import advise, fit_runs, read_fit
from cramjax.scaling.advice.rules import with_decay_for
from tests.scaling.fit.tables import CHINCHILLA, best_size, isoflop_table

TOKENS_PER_BYTE = 0.22


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit of Chinchilla's law, with bits per byte."""
    table = isoflop_table(CHINCHILLA, noise=0.003, flops=(1e17, 1e20))
    table["bits_per_byte"] = table["loss"] * TOKENS_PER_BYTE / math.log(2)
    path = tmp_path_factory.mktemp("fits") / "fit.json"
    path.write_text(json.dumps(fit_runs(table).json()), encoding="utf-8")
    return path


def size_of(recipe: Path) -> int:
    config = load_recipe(recipe)
    return count_parameters(config.model, config.tokenizer.vocab_size, config.data.sequence_length).total


def test_flops_become_a_recipe(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, found = tmp_path / "run.yaml", tmp_path / "run.json"
    words = ["advise", "--fit", str(file), "--budget", "6e18flop", "--tuned_at", "3e18flop"]
    assert cli.main([*words, "--out", str(out), "--json", str(found)]) == 0
    printed, made = capsys.readouterr().out, json.loads(found.read_text(encoding="utf-8"))
    config, base = load_recipe(out), load_recipe("gpt-124m")
    # The law's closed form, and what the realised model's parameters leave of the FLOPs for tokens.
    assert size_of(out) == made["params"] == pytest.approx(best_size(CHINCHILLA, 6e18), rel=0.1)
    assert float(config.budget.removesuffix("tok")) == pytest.approx(6e18 / 6 / size_of(out), rel=1e-6)
    advice = advise(read_fit(file), flops=6e18)
    assert made["bits_per_byte"] == pytest.approx(advice.loss * TOKENS_PER_BYTE / math.log(2), rel=1e-9)
    low, high = made["bits_per_byte_interval"]
    assert low < made["bits_per_byte"] < high and "bits per byte" in printed
    # Muon's rate holds; the batch grows with FLOPs^0.327, in microbatches of 16; rate · decay · steps is the base's.
    assert config.optim.lr == base.optim.lr
    assert config.batch.size == 16 * round(512 / 16 * 2**0.3271)
    steps, before = 6e18 / size_of(out) / config.batch.size, 3e18 / base_size() / base.batch.size
    assert config.optim.weight_decay * steps == pytest.approx(base.optim.weight_decay * before, rel=1e-3)
    assert "arXiv:2405.13698" in printed and "warning" not in printed
    # In a notebook, the same.
    made = cramjax.advise(read_fit(file), "6e18flop", "gpt-124m", tuned_at="3e18flop")
    assert made.config == config and str(made) in printed


def base_size() -> int:
    config = load_recipe("gpt-124m")
    return count_parameters(config.model, config.tokenizer.vocab_size, config.data.sequence_length).total


def test_time_on_a_card_and_size_agree(file: Path, tmp_path: Path):
    out, found = tmp_path / "run.yaml", tmp_path / "run.json"
    words = ["advise", "--fit", str(file), "--budget", "24h", "--device", "rtx4090"]
    assert cli.main([*words, "--out", str(out), "--json", str(found)]) == 0
    made, config = json.loads(found.read_text(encoding="utf-8")), load_recipe(out)
    assert config.budget == "24h"
    assert made["tokens"] == pytest.approx(24 * 3600 * made["tokens_per_second"], rel=1e-6)
    # The advice is for the FLOPs that the run will spend, up to a step from one shape to the next.
    assert made["advice"]["flops"] == pytest.approx(6 * size_of(out) * made["tokens"], rel=0.1)
    assert size_of(out) == pytest.approx(made["advice"]["params"], rel=0.1)
    assert "RTX 4090" in made["device"]


def test_tokens_become_the_size_they_are_best_for(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = tmp_path / "run.json"
    assert cli.main(["advise", "--fit", str(file), "--budget", "3Gtok", "--json", str(found)]) == 0
    made = json.loads(found.read_text(encoding="utf-8"))
    assert made["advice"]["tokens"] == pytest.approx(3e9, rel=2e-3)
    assert "warning: batch and decay time are the base's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "500steps"], "a step is as long as its batch: give a time, tokens or FLOPs"),
        (["--budget", "24"], "has no unit"),
        (["--budget", "1e18flop", "--recipe", "no"], "there is no recipe 'no'"),
        (["--budget", "1e18flop", "--out", "/no/such/place.yaml"], "Give another file to --out"),
        ([], "the following arguments are required: --budget"),
    ],
)
def test_mistakes(file: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["advise", "--fit", str(file), *words]) == 2
    assert message in capsys.readouterr().err


def test_decay_keeps_the_share_of_the_run_that_weights_remember():
    tuned = OptimConfig(lr=1e-3, embed_lr=4e-3, weight_decay=0.1)
    new = with_decay_for(tuned, OptimConfig(lr=5e-4, embed_lr=4e-3, weight_decay=0.1), 4.0)
    assert new.weight_decay * 5e-4 * 4 == pytest.approx(0.1 * 1e-3)
    assert new.embed_weight_decay == pytest.approx(0.1 / 4)
    assert with_decay_for(tuned, tuned, None).weight_decay == 0.1
