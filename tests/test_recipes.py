"""Recipes: found, strict, overridden, and the same after a round trip."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cramjax.budget import Budget
from cramjax.config import DataConfig, EvaluateConfig, OptimConfig, RopeScaling, RunConfig
from cramjax.errors import ConfigError
from cramjax.loading import from_mapping, load
from cramjax.ranges import Count, Share
from cramjax.recipes import differing_fields, from_yaml, load_recipe, override, recipe_names, recipe_path, to_yaml

_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20)


def test_the_promised_recipes_exist():
    assert set(recipe_names()) >= {"quickstart", "crammed-bert", "crammed-bert-mini", "gpt-mini", "gpt-124m"}


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_loads_and_survives_a_round_trip(name: str):
    config = load_recipe(name)
    assert from_yaml(to_yaml(config)) == config


def test_the_rate_of_an_adapter_is_said_to_be_none_for_all_weights(caplog: pytest.LogCaptureFixture):
    load_recipe("tune-chat", ["adapter=null"])
    assert "all weights are trained at optim.lr=0.0001" in caplog.text and "give --optim.lr=1e-05" in caplog.text
    caplog.clear()
    load_recipe("tune-chat", ["adapter=null", "optim.lr=1e-5"])
    load_recipe("tune-chat", {"adapter.rank": 4})
    load_recipe("quickstart", ["adapter=null"])
    assert not caplog.records


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_states_what_it_trains_first(name: str):
    first = recipe_path(name).read_text(encoding="utf-8").splitlines()[:6]
    comment = " ".join(line for line in first if line.startswith("# "))
    assert comment.startswith("# Trains ")
    assert "Data: " in comment and re.search(r"\d+ ?(min|h\b)", comment)
    assert re.search("not (measured|trained) yet|bits per byte", comment)


@pytest.mark.parametrize(
    ("name", "budget", "kind"),
    [
        ("quickstart", "3min", "causal"),
        ("gpt-mini", "5min", "causal"),
        ("crammed-bert-mini", "10min", "masked"),
        ("crammed-bert", "24h", "masked"),
        ("gpt-124m", "24h", "causal"),
    ],
)
def test_recipe_budget_and_objective(name: str, budget: str, kind: str):
    config = load_recipe(name)
    assert Budget.parse(config.budget) == Budget.parse(budget)
    assert config.objective.kind == kind


def test_recipe_by_path(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("budget: 500steps\noptim:\n  lr: 1e-3\n", encoding="utf-8")  # 1e-3 is a string to YAML 1.1
    assert load_recipe(file) == RunConfig(budget="500steps", optim=OptimConfig(lr=1e-3))


def test_overrides_as_words_as_a_dotted_and_as_a_nested_mapping_agree():
    words = load_recipe("quickstart", ["--optim.lr=2e-3", "budget=10min", "model.kv_heads=null"])
    dotted = load_recipe("quickstart", {"optim.lr": 2e-3, "budget": "10min", "model.kv_heads": None})
    nested = load_recipe("quickstart", {"optim": {"lr": 2e-3}, "budget": "10min", "model": {"kv_heads": None}})
    assert words == dotted == nested
    assert words.optim.lr == 2e-3 and words.budget == "10min"
    assert words.model == load_recipe("quickstart").model  # the rest is the recipe's


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data.source=a.txt", "a.txt"),
        ("data.source=[a.txt,b.txt]", ["a.txt", "b.txt"]),
        ("data.source=corpus/[a-m]*.txt", "corpus/[a-m]*.txt"),
        ("data.source=2024", "2024"),
    ],
)
def test_source_is_a_text_or_a_list_on_the_command_line(word: str, expected: object):
    assert load_recipe("quickstart", [word]).data.source == expected


def test_source_and_samples_in_yaml():
    config = from_yaml("data: {source: [a.txt, 'null']}\nevaluate: {samples: ['1', '[a]', '']}")
    assert config.data.source == ["a.txt", "null"]
    assert config.evaluate.samples == ("1", "[a]", "")


def test_samples_on_the_command_line():
    config = load_recipe("crammed-bert-mini", ["--evaluate.samples=['a [MASK]', 'b [MASK]']"])
    assert config.evaluate.samples == ("a [MASK]", "b [MASK]")


@settings(max_examples=30, deadline=None)
@given(_TEXT, st.lists(_TEXT, max_size=3), st.floats(1e-12, 1e12), st.none() | st.integers(1, 10**12))
def test_any_values_survive_a_round_trip(field: str, samples: list[str], lr: float, limit: int | None):
    config = RunConfig(
        data=DataConfig(text_field=field, validation=field.strip() or None, limit_bytes=limit),
        evaluate=EvaluateConfig(samples=tuple(samples)),
        optim=OptimConfig(lr=lr),
    )
    assert from_yaml(to_yaml(config)) == config


def test_a_group_that_may_be_null_is_given_by_its_fields_or_as_null():
    scaled = load_recipe("quickstart", {"model.rope_scaling": {"kind": "linear", "factor": 2}})
    assert scaled.model.rope_scaling == RopeScaling("linear", 2.0)
    assert scaled == load_recipe("quickstart", ["model.rope_scaling.kind=linear", "model.rope_scaling.factor=2"])
    assert from_yaml(to_yaml(scaled)) == scaled
    assert override(scaled, {"model.rope_scaling.factor": 4}).model.rope_scaling == RopeScaling("linear", 4.0)
    assert override(scaled, {"model.rope_scaling": None}).model.rope_scaling is None
    assert override(scaled, ["model.rope_scaling=null"]) == load_recipe("quickstart")
    with pytest.raises(ConfigError, match=r"model\.rope_scaling is a group of fields, got '{kind'"):
        override(scaled, ["model.rope_scaling={kind"])
    assert differing_fields(scaled, load_recipe("quickstart"))["model.rope_scaling.factor"] == (2, None)
    for values, message in (
        ({"kind": "linear"}, "model.rope_scaling.factor must be given: a number."),
        ({"kind": "linear", "factor": 0.5}, "model.rope_scaling.factor must be at least 1, got 0.5."),
        (
            {"kind": "linear", "factr": 2},
            "unknown option model.rope_scaling.factr; did you mean model.rope",
        ),
        (
            {"kind": "dynamic", "factor": 2},
            "model.rope_scaling.kind must be one of linear, llama3, yarn, got",
        ),
        (2, "model.rope_scaling is a group of fields, got 2"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_recipe("quickstart", {"model.rope_scaling": values})


@dataclasses.dataclass(frozen=True)
class Part:
    """A group."""

    size: Count
    """At least 1."""
    share: Share | None = None


@dataclasses.dataclass(frozen=True)
class Verb:
    """A configuration that is no run's."""

    name: str
    part: Part
    rest: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[Part, ...] = ()


def test_any_dataclass_is_loaded_as_strictly(tmp_path: Path):
    file = tmp_path / "verb.yaml"
    file.write_text(
        "name: '3'\npart: {size: 1}\nrest: {a: '1', b: [null]}\nparts: [{size: 2}, {size: 3, share: 1}]",
        encoding="utf-8",
    )
    parts = (Part(2), Part(3, 1.0))
    assert load(Verb, file, ["part.share=0.5"]) == Verb("3", Part(1, 0.5), {"a": "1", "b": [None]}, parts)
    for overrides, message in (
        ({"part.size": 0}, "part.size must be at least 1, got 0."),
        ({"part.share": 2}, "part.share must be from 0 to 1, got 2."),
        ({"parts": [{"size": 1}, {"size": 0}]}, "parts[1].size must be at least 1, got 0."),
        ({"parts": [{"sise": 1}]}, "parts must be a list of mappings of size, share, got [{'sise': 1}]"),
        ({"size": 2}, "unknown option size; did you mean part.size?"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load(Verb, file, overrides)
    with pytest.raises(ConfigError, match=re.escape("part.size must be given: an integer.")):
        from_mapping(Verb, {"name": "x", "part.share": 0.5})
    with pytest.raises(ConfigError, match=re.escape("part must be given")):
        from_mapping(Verb, {"name": "x"})


def test_yaml_holds_every_field():
    loaded = yaml.safe_load(to_yaml(RunConfig()))
    for field in dataclasses.fields(RunConfig):
        value = getattr(RunConfig(), field.name)
        if dataclasses.is_dataclass(value):
            assert set(loaded[field.name]) == {inner.name for inner in dataclasses.fields(value)}
    assert set(loaded) == {field.name for field in dataclasses.fields(RunConfig)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=3"], "unknown option --optim.lrr; did you mean --optim.lr?"),
        (["optm.lr=3"], "unknown option --optm.lr; did you mean --optim.lr?"),
        (["lr=3"], "did you mean --optim.lr?"),
        (["bugdet=3min"], "did you mean --budget?"),
        (["optim.frobnicate=3"], "Fields of optim: name, lr, "),
        (["frobnicate=3"], "Groups of fields: data, examples, labels, tokenizer, model"),
        (["optim.lr=fast"], "--optim.lr must be a number, got 'fast'."),
        (["batch.size=3.5"], "--batch.size must be an integer, got '3.5'."),
        (["batch.microbatch=x"], "--batch.microbatch must be an integer or null, got 'x'."),
        (["model.qk_norm=maybe"], "--model.qk_norm must be true or false, got 'maybe'."),
        (["optim.name=adamww"], "--optim.name must be one of adamw, muon,"),
        (["optim.name=adamww"], "got 'adamww'; did you mean adamw?"),
        (["model.qk_norm"], "--model.qk_norm needs a value: true or false."),
        (["evaluate.samples=hello"], "--evaluate.samples must be a list of texts such as [one, two], got 'hello'."),
        (["model.adaptive_head=8"], "--model.adaptive_head must be a list of integers such as [1, 2], got '8'."),
        (["optim=3"], "optim is a group of fields, got '3': give its fields, for example optim.name=…."),
        ({"optim": 3}, "optim is a group of fields, got 3"),
        ({"optim": {"lrr": 3}}, "unknown option optim.lrr; did you mean optim.lr?"),
        ({"model.heads": "x"}, "model.heads must be an integer, got 'x'."),
        ({"data.hub_config": 2024}, "data.hub_config must be a text or null, got 2024. In YAML, put quotes"),
        ({"data.source": [1]}, "data.source must be a text or a list of texts"),
        ({"model.heads": None}, "model.heads must be an integer, got None."),
        (["model.heads=null"], "--model.heads must be an integer, got 'null'."),
        ({"model.heads": True}, "model.heads must be an integer, got True."),
        (["model.from=run", "--model.layers=3"], "model.layers: the architecture is that of run, with which this run"),
        ({"model": {"from": "run", "heads": 2}, "model.dropout": 0.1}, "model.heads: the architecture is that of run"),
    ],
)
def test_wrong_overrides_are_explained(overrides: list[str] | dict[str, object], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe("quickstart", overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: 1, lr: 2}", "given twice"),
        ("seed: 1\nseed: 2", "key 'seed' is given twice"),
        ("optim: [1, 2", "not valid YAML"),
        ("", "must be a YAML mapping of fields such as `budget: 10min`, got nothing"),
        ("- a", "got a list"),
        ("budget: 300", "has no unit"),
        ("modle: {heads: 2}", "unknown option modle"),
        ("model: 12", "model is a group of fields, got 12"),
    ],
)
def test_wrong_yaml_is_explained_with_its_file(tmp_path: Path, text: str, message: str):
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load_recipe(file)
    if "unit" not in message:
        assert str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quickstrat", "there is no recipe 'quickstrat'; did you mean quickstart? Recipes: crammed-bert,"),
        ({"optim.lr": 0.03}, "a recipe is a name or the path of a YAML file, got {'optim.lr': 0.03}"),
        ("zzz", "there is no recipe 'zzz'. Recipes: crammed-bert,"),
        ("missing.yaml", "there is no recipe file 'missing.yaml'"),
        (".", "'.' is a directory"),
    ],
)
def test_unknown_recipe(name: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(name)


def test_configuration_does_not_import_jax():
    program = "import sys, cramjax.recipes; cramjax.recipes.load_recipe('quickstart'); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
