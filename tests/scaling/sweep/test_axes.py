"""Sweep files: which trials they make, that names are stable, and what each mistake is told."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import cramjax
from cramjax.budget import Budget
from cramjax.errors import ConfigError
from cramjax.recipes import load_recipe, recipe_names, sweep_path
from cramjax.scaling.sweep.axes import Trial, read_sweep

GRID: dict[str, Any] = {"base": "quickstart", "axes": {"grid": {"optim.lr": [1e-3, 2e-3], "seed": [0, 1]}}}


def read(folder: Path, content: dict[str, Any], **overrides: Any) -> list[Trial]:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return read_sweep(file, overrides)


def test_a_grid_is_every_combination(tmp_path: Path):
    trials = read(tmp_path, {**GRID, "set": {"model": {"layers": 2}}})
    assert [trial.name for trial in trials] == [
        "lr=0.001_seed=0",
        "lr=0.001_seed=1",
        "lr=0.002_seed=0",
        "lr=0.002_seed=1",
    ]
    assert trials[3].config == load_recipe("quickstart", {"optim.lr": 2e-3, "seed": 1, "model.layers": 2})


def test_a_zip_goes_together_and_combines_with_a_grid(tmp_path: Path):
    axes = {"grid": {"seed": [0, 1]}, "zip": {"model.width": [64, 128], "model.mlp": [256, 512]}}
    trials = read(tmp_path, {"base": "quickstart", "axes": axes})
    assert [(t.config.seed, t.config.model.width, t.config.model.mlp) for t in trials] == [
        (0, 64, 256),
        (0, 128, 512),
        (1, 64, 256),
        (1, 128, 512),
    ]


def test_only_whole_trials_must_be_possible(tmp_path: Path):
    axes = {"zip": {"model.width": [96], "model.mlp": [384]}}  # the recipe's own width is no multiple of 6
    (trial,) = read(tmp_path, {"base": "quickstart", "set": {"model.heads": 6}, "axes": axes})
    assert (trial.config.model.width, trial.config.model.heads) == (96, 6)


def test_a_name_says_what_varies_and_survives_more_values(tmp_path: Path):
    few = read(tmp_path, GRID)
    more = read(tmp_path, {**GRID, "axes": {"grid": {"optim.lr": [4e-3, 1e-3, 2e-3], "seed": [0, 1, 2]}}})
    assert {t.name: t.config for t in few}.items() <= {t.name: t.config for t in more}.items()


def test_fields_of_one_name_are_told_apart(tmp_path: Path):
    grid = {"model.bias": [True], "checkpoint.points": [5], "evaluate.points": [4]}
    trials = read(tmp_path, {"base": "quickstart", "axes": {"grid": grid}})
    assert trials[0].name == "bias=true_checkpoint.points=5_evaluate.points=4"


def test_isoflop_is_sizes_by_budgets(tmp_path: Path):
    base = {"base": "gpt-mini", "set": {"model.heads": 6, "tokenizer.vocab_size": 2048, "model.adaptive_head": []}}
    axes = {"isoflop": {"budgets": ["4e12flop", 1e12], "sizes": [["660k", 1.27e6], ["295k"]]}, "grid": {"seed": [0, 1]}}
    trials = read(tmp_path, {**base, "axes": axes})
    assert [trial.name for trial in trials] == [
        "1e12flop_295k_seed=0",
        "1e12flop_295k_seed=1",
        "4e12flop_660k_seed=0",
        "4e12flop_1.27M_seed=0",
        "4e12flop_660k_seed=1",
        "4e12flop_1.27M_seed=1",
    ]
    assert Budget.parse(trials[-1].config.budget) == Budget(4e12, "flops")
    assert trials[3].config.model.width > trials[2].config.model.width


def test_overrides_reach_every_trial(tmp_path: Path):
    assert all(t.config.budget == "5steps" for t in read(tmp_path, GRID, budget="5steps"))


def isoflop(**changes: Any) -> dict[str, Any]:
    return {"base": "gpt-mini", "axes": {"isoflop": {"budgets": [1e12], "sizes": ["3.6M"], **changes}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**GRID, "axes": {"grid": {"optim.lrr": [1]}}}, "unknown option optim.lrr; did you mean optim.lr?"),
        ({**GRID, "axes": {"grid": {"optim.lr": ["fast"]}}}, "optim.lr must be a number, got 'fast'"),
        ({**GRID, "axes": {"grid": {"optim.lr": 1e-3}}}, "optim.lr must have a list of values, got 0.001"),
        ({**GRID, "axes": {"grid": {"seed": [1, 1]}}}, "two trials are the same, seed=1"),
        ({**GRID, "axes": {"zip": {"seed": [1], "optim.lr": [1, 2]}}}, "its lists must be equally long:"),
        ({**GRID, "axes": {"zip": {"seed": [1]}, "grid": {"seed": [2]}}}, "seed is in two axes"),
        ({**GRID, "set": {"seed": 1}}, "seed is both set and an axis"),
        ({**GRID, "axes": {"random": {}}}, "unknown option axes.random. Fields of axes: grid, zip, isoflop."),
        ({**GRID, "axes": {}}, "a sweep needs `axes`"),
        ({**GRID, "axes": 3}, "axes is a group of fields, got 3: give its fields, for example axes.grid=…."),
        ({"axes": GRID["axes"]}, "base must be given: a text."),
        ({**GRID, "base": [1]}, "base must be a text, got [1]."),
        ({**GRID, "set": [1]}, "set must be a mapping or null, got [1]."),
        (isoflop(sizes=None), "axes.isoflop.sizes must be a list of values"),
        (isoflop(sizes=[]), "axes.isoflop.sizes must be a list with values, got []"),
        ({**GRID, "axes": {"isoflop": {"sizes": ["1M"]}}}, "axes.isoflop.budgets must be given: a list of values"),
        ({**GRID, "axes": {"grid": {}}}, "a sweep needs `axes` with values"),
        ({**GRID, "axes": {"zip": None}}, "a sweep needs `axes` with values"),
        (
            {**GRID, "budget": "1min"},
            "unknown option budget. Groups of fields: axes; fields without a group: base, set.",
        ),
        ({**GRID, "base": "quickstrat"}, "did you mean quickstart?"),
        (
            isoflop(sizes=["3.6Q"]),
            "a size must be a positive number of parameters, such as 3.5M or 1e6 (k, M, B and G are known), got '3.6Q'",
        ),
        (isoflop(sizes=["1e30"]), "a size must be above 0 and at most 1e+12 parameters, got 1e+30"),
        (isoflop(sizes=["2k"]), "no model of this family has about 2,000 parameters"),
        (isoflop(sizes=["3.6M", "3.61M"]), "are the same model (3 layers × 192)"),
        (isoflop(sizes=[["3.6M"], ["3.6M"]]), "one for each of the 1 budgets; got 2"),
        (isoflop(budgets=["5min"]), "an IsoFLOP budget must be FLOPs, such as 1e15flop, got '5min'"),
        ({**isoflop(), "set": {"budget": "1min"}}, "axes.isoflop has the budgets of its own"),
        (isoflop(budget=1), "unknown option axes.isoflop.budget; did you mean axes.isoflop.budgets?"),
        (isoflop(count="all"), "axes.isoflop.count must be one of params, params_non_embedding, got 'all'."),
    ],
)
def test_mistakes_are_one_message(content: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, content)
    assert message in str(error.value) and str(error.value).count("\n") == 0


def test_a_sweep_is_no_recipe_and_a_recipe_no_sweep(tmp_path: Path):
    assert "isoflop-mini" not in recipe_names()
    with pytest.raises(ConfigError, match="is a sweep .* run it with `cramjax sweep"):
        load_recipe("isoflop-mini")
    with pytest.raises(ConfigError, match="quickstart is a recipe, and a sweep also has axes"):
        sweep_path("quickstart")
    with pytest.raises(ConfigError, match="did you mean isoflop-mini"):
        sweep_path("isoflop-mimi")


def test_a_mapping_is_as_good_as_a_file_but_has_no_name(tmp_path: Path):
    assert read_sweep(GRID, {"model.layers": 1}) == read(tmp_path, GRID, **{"model.layers": 1})
    with pytest.raises(ConfigError, match="has no name: give its directory as out"):
        cramjax.sweep(GRID)
    with pytest.raises(ConfigError, match=r"^unknown option bse; did you mean base\?"):
        read_sweep({"bse": "quickstart"})


def test_the_sweep_that_comes_with_cramjax_has_four_budgets_of_five_sizes():
    trials = read_sweep("isoflop-mini")
    budgets = [trial.config.budget for trial in trials]
    assert len(set(budgets)) >= 4 and all(budgets.count(budget) >= 5 for budget in budgets)
