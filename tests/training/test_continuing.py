"""Continued pretraining: a run that starts from the weights of a model."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cramjax.config import ModelConfig, RunConfig
from cramjax.errors import ConfigError, ModelError, RunError
from cramjax.language_model import load_model
from cramjax.model_yaml import read_description, write_description
from cramjax.recipes import load_recipe
from cramjax.training import Run, load_run, resume, train
from cramjax.training.continuing import continued, starting_params
from cramjax.training.parts import build_model
from cramjax.training.run import read_config


@pytest.fixture(scope="module")
def parent(corpus: Path, cache_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    from tests.training.conftest import TINY

    config = load_recipe("quickstart", {"data.source": str(corpus / "*.txt"), **TINY})
    run = train(config, tmp_path_factory.mktemp("parents") / "parent")
    run.language_model.save(run.path / "model")
    return run


def _difference(a: Any, b: Any) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("given", ["model", ""], ids=["model directory", "run directory"])
def test_a_run_starts_from_a_models_weights(parent: Run, tiny: Callable[..., RunConfig], tmp_path: Path, given: str):
    # Another architecture, which gives way to the model's; steps too small to move a weight.
    config = tiny(start_from=str(parent.path / given), model__width=64, budget="1steps", optim__name="adamw")
    config = replace(config, optim=replace(config.optim, lr=1e-30, embed_lr=1e-30, head_lr=1e-30, scalar_lr=1e-30))
    run = train(config, tmp_path / "run")
    assert run.config.model == parent.config.model
    assert run.tokenizer.to_json() == parent.tokenizer.to_json()
    assert _difference(run.params, parent.params) == 0
    assert run.summary["bits_per_byte"] == pytest.approx(parent.summary["bits_per_byte"], rel=1e-6)


def test_going_on_is_better_than_beginning_and_leaves_frozen_weights(
    parent: Run, tiny: Callable[..., RunConfig], tmp_path: Path
):
    path = str(parent.path / "model")
    run = train(tiny(start_from=path, train__freeze=("embed/*",)), tmp_path / "run")
    assert run.summary["steps"] == 24  # a budget and a clock of its own
    assert run.summary["bits_per_byte"] < parent.summary["bits_per_byte"]
    assert _difference(run.params["embed"], parent.params["embed"]) == 0
    assert _difference(run.params["blocks"], parent.params["blocks"]) > 0


def test_a_resumed_run_no_longer_needs_the_model(parent: Run, tiny: Callable[..., RunConfig], tmp_path: Path):
    model = parent.language_model.save(tmp_path / "model")
    whole = train(tiny(start_from=str(model)), tmp_path / "whole")
    begun = train(tiny(start_from=str(model), budget="12steps"), tmp_path / "run")
    shutil.rmtree(model)
    del begun
    run = resume(tmp_path / "run", budget="24steps")
    assert run.summary["steps"] == whole.summary["steps"] == 24
    assert read_config(run.path).tokenizer.path == str(run.path / "tokenizer.json")


def test_what_the_model_sees_stays_however_short_the_sequences(
    parent: Run, tiny: Callable[..., RunConfig], tmp_path: Path
):
    short = tiny(start_from=str(parent.path / "model"), data__sequence_length=8, budget="1steps")
    run = train(short, tmp_path / "run")
    assert (run.config.data.sequence_length, run.language_model.context) == (8, 32)
    assert load_run(run.path).language_model.context == 32
    assert read_description(run.language_model.save(tmp_path / "model")).context == 32
    # A run that starts from it keeps it in turn; beside virtual tokens there is less room.
    again = tiny(start_from=str(run.path), data__sequence_length=8, adapter__kind="prefix", adapter__virtual_tokens=5)
    assert continued(again).context == 27
    assert continued(continued(again)) == continued(again)
    assert continued(tiny(start_from=str(run.path), data__sequence_length=64)).data.sequence_length == 32
    # What is written down of an older run has no such field.
    old = tmp_path / "run" / "config.yaml"
    text = old.read_text(encoding="utf-8").replace("  context: 32\n", "")
    old.write_text(text, encoding="utf-8")
    assert read_config(run.path).context == 8


def test_several_devices_share_the_weights_that_a_run_starts_from(
    parent: Run, tiny: Callable[..., RunConfig], tmp_path: Path
):
    config = tiny(start_from=str(parent.path / "model"), budget="1steps", train__data_parallel=1, train__fsdp=2)
    shared = train(config, tmp_path / "shared")
    alone = train(replace(config, train=replace(config.train, fsdp=1)), tmp_path / "alone")
    # Sums in another order: the rounding of float32, times what one step of Muon makes of it.
    assert _difference(shared.params, alone.params) < 1e-4


def test_a_recipe_with_a_head_may_start_from_a_model_without_one(
    parent: Run, tiny: Callable[..., RunConfig], tmp_path: Path
):
    write_description(tmp_path, replace(read_description(parent.path / "model"), architecture=ModelConfig(tied=True)))
    assert parent.config.optim.head_lr == 0.02
    assert continued(tiny(start_from=str(tmp_path))).optim == replace(parent.config.optim, head_lr=None)


def test_text_is_normalised_as_it_was_for_the_model(parent: Run, tiny: Callable[..., RunConfig], tmp_path: Path):
    lower = replace(parent.language_model, normalize="ascii_lower").save(tmp_path / "lower")
    assert continued(tiny(start_from=str(lower))).data.normalize == "ascii_lower"
    assert continued(tiny(start_from=str(parent.path), data__normalize="nfkc")).data.normalize == "nfc"


def test_rows_without_tokens_are_cut_and_padding_is_zero(parent: Run, tmp_path: Path):
    wide = replace(parent.config, model=replace(parent.config.model, vocab_multiple=128))
    model = build_model(wide, parent.tokenizer)
    params = starting_params(parent.path / "model", model)
    vocab, table = parent.tokenizer.vocab_size, params["embed"]["token"]["table"]
    assert table.shape[0] % 128 == 0
    np.testing.assert_array_equal(table[:vocab], parent.params["embed"]["token"]["table"][:vocab])
    assert not np.asarray(table[vocab:]).any()


def test_a_model_that_turns_out_to_be_damaged_leaves_no_run(
    parent: Run, tiny: Callable[..., RunConfig], tmp_path: Path
):
    """Its weights are read once the run has its configuration and its log."""
    model = parent.language_model.save(tmp_path / "model")
    for file in model.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError):
        train(tiny(start_from=str(model)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_continued_is_said(parent: Run, tiny: Callable[..., RunConfig], tmp_path: Path):
    with pytest.raises(RunError, match="is not a run directory"):
        continued(tiny(start_from=str(tmp_path / "nothing")))
    deeper = replace(parent.config, model=replace(parent.config.model, mlp=96))
    with pytest.raises(ModelError, match=r"blocks/mlp/down/kernel must have shape \(2, 96, 32\).* has \(2, 64, 32\)"):
        starting_params(parent.path / "model", build_model(deeper, parent.tokenizer))
    encoder = replace(load_model(parent.path / "model"), kind="encoder").save(tmp_path / "encoder")
    with pytest.raises(ModelError, match="is an encoder without a head"):
        continued(tiny(start_from=str(encoder)))
    with pytest.raises(ConfigError, match=r"train\.offload_optimizer"):
        tiny(start_from=str(parent.path / "model"), train__offload_optimizer=True, optim__name="adamw")
