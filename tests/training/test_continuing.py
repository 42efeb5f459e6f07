"""Continued pretraining: a run that starts from the weights of a model."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, processors

from cramjax.classifier import ClassifierConfig
from cramjax.config import ModelConfig, RunConfig, TokenizerConfig
from cramjax.data import Tokenizer
from cramjax.data.examples import PreparedLabels, prepare_labels
from cramjax.data.tokenizer import make_tokenizer
from cramjax.errors import ConfigError, ModelError, RunError
from cramjax.language_model import LanguageModel, load_model
from cramjax.model import Model, make_model
from cramjax.model_yaml import read_description, write_description
from cramjax.recipes import load_recipe
from cramjax.training import Run, continuing, load_run, resume, train
from cramjax.training.continuing import continued, model_vocabulary, run_vocabulary, starting_params
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


def test_the_vocabulary_of_a_model_is_as_its_model_yaml_has_it_and_a_runs_is_its_own(tmp_path: Path):
    """BERT's special tokens, of which the names tell only some: `[CLS]` before a text would be taken for `[SEP]`."""
    backend = tokenizers.Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3}, unk_token="a"))
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer = Tokenizer(backend, 2, None, 0, (1,))
    model = make_model(
        ModelConfig(layers=1, width=8, heads=1, mlp=8), vocab_size=4, sequence_length=8, causal=False, separator_id=2
    )
    path = LanguageModel(
        tmp_path, "encoder", tokenizer, 8, model, model.init(jax.random.key(0))
    ).save(tmp_path / "model")  # fmt: skip
    assert Tokenizer.load(path / "tokenizer.json").begin_ids is None  # as names tell
    found, _ = model_vocabulary(path)
    assert (found.begin_ids, found.separator_id, found.pad_id) == ((1,), 2, 0)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{"a " * n}", "label": {n % 2}}}\n' for n in range(1, 6)), encoding="utf-8")
    config = load_recipe("tune-classify", {"start_from": str(path), "labels.source": str(rows)})
    tokens: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuing, "prepare_labels", lambda *given: _kept(prepare_labels(*given), tokens))
        assert continued(config).labels.names == ("0", "1")  # pyright: ignore[reportOptionalMemberAccess]
    assert {(ids[0], ids[-1]) for ids in tokens} == {(1, 2)}
    out = tmp_path / "run"
    out.mkdir()
    assert run_vocabulary(config, out)[0].begin_ids == (1,)
    replace(tokenizer, begin_ids=(1, 1)).save(out / "tokenizer.json")
    assert run_vocabulary(config, out)[0].begin_ids == (1, 1)
    assert model_vocabulary(path)[0].begin_ids == (1,)


def _kept(prepared: PreparedLabels, tokens: list[list[int]]) -> PreparedLabels:
    tokens += [prepared.train.example(number).ids.tolist() for number in range(len(prepared.train))]
    return prepared


def test_a_head_tuned_on_pairs_is_kept_for_single_texts(tmp_path: Path):
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes"), [])
    bare = ModelConfig(layers=1, width=8, heads=1, mlp=8)

    def model_of(pairs: bool | None, labels: tuple[str, ...]) -> Model:
        made = replace(bare, classifier=ClassifierConfig(labels, pairs=pairs))
        sizes = {"vocab_size": tokenizer.vocab_size, "sequence_length": 8}
        return make_model(made, **sizes, causal=False, separator_id=tokenizer.separator_id)

    model = model_of(True, ("no", "yes"))
    params = model.init(jax.random.key(3))
    path = LanguageModel(tmp_path, "labels", tokenizer, 8, model, params).save(tmp_path / "model")
    own = params["head"]["classifier"]
    for pairs, labels, kept in ((None, ("no", "yes"), True), (False, ("no", "yes"), True), (True, ("a", "b"), False)):
        head = starting_params(path, model_of(pairs, labels))["head"]["classifier"]
        assert (_difference(head, own) == 0) == kept
