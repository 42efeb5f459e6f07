"""Runs that train an adapter beside the weights of a model."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cramjax.config import RunConfig
from cramjax.errors import ConfigError, DataError, ModelError, RunError, RunInterruptedError
from cramjax.evaluation import evaluate_text
from cramjax.finish import finish
from cramjax.kernels.packed import LowRank, NormalFloat, Quantised, is_packed
from cramjax.language_model import load_model
from cramjax.planning import estimate_memory
from cramjax.recipes import load_recipe
from cramjax.serve import generate
from cramjax.training import PairEvaluation, load_run, resume, train
from cramjax.training.checkpoint import list_checkpoints
from cramjax.training.display import QuietDisplay
from cramjax.training.metrics import read_records
from cramjax.tune import merge_model

Tiny = Callable[..., RunConfig]

ADAMW = {"optim__name": "adamw", "optim__lr": 1e-2}
VIRTUAL = {**ADAMW, "adapter__virtual_tokens": 4, "optim__lr": 3e-2}
LORA = {**ADAMW, "adapter__kind": "lora", "adapter__rank": 4}


class Told(QuietDisplay):
    """Keeps what is said."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


class StopAt(QuietDisplay):
    """Interrupts a run at the first line that it logs after a step."""

    def __init__(self, step: int):
        super().__init__()
        self._step = step

    def record(self, record: Any) -> None:
        if record["kind"] == "train" and record["step"] >= self._step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def parent(corpus: Path, cache_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory."""
    from tests.training.conftest import TINY

    config = load_recipe("quickstart", {"data.source": str(corpus / "*.txt"), **TINY, "model.bias": True})
    run = train(config, tmp_path_factory.mktemp("parents") / "parent")
    return run.language_model.save(run.path / "model")


def score_of(parent: Path) -> float:
    """Held-out bits per byte of the model before it was tuned."""
    return load_run(parent.parent).summary["bits_per_byte"]


def leaves(tree: Any) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in flat}


def size_of(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "trained"),
    [
        (LORA, {"a", "b"}),
        ({**LORA, "adapter__dora": True, "adapter__rank_stabilised": True}, {"a", "b", "magnitude"}),
        ({**ADAMW, "adapter__kind": "ia3"}, {"inputs", "outputs"}),
        ({**ADAMW, "adapter__kind": "bitfit"}, {"bias"}),
        ({**VIRTUAL, "adapter__kind": "prompt", "adapter__base": "float32"}, {"rows"}),
        ({**VIRTUAL, "adapter__kind": "prefix"}, {"keys", "values"}),
    ],
    ids=["lora", "dora", "ia3", "bitfit", "prompt", "prefix"],
)
def test_only_the_adapter_is_trained_and_it_helps(
    parent: Path, tiny: Tiny, tmp_path: Path, options: dict[str, Any], trained: set[str]
):
    model = load_model(parent)
    run = train(tiny(start_from=str(parent), **options), tmp_path / "run")
    before, after = leaves(model.params), leaves(run.params)
    changed = {path.rpartition("/")[2] for path, array in after.items() if not np.array_equal(array, before.get(path))}
    assert changed - {"base"} == trained
    for path, array in after.items():
        if path.endswith("/base"):
            np.testing.assert_array_equal(array, before[path.removesuffix("/base")])
    assert run.summary["bits_per_byte"] < score_of(parent)
    # And it is the same when it is read again.
    again = leaves(load_run(run.path).params)
    assert again.keys() == after.keys()
    for path, array in again.items():
        np.testing.assert_array_equal(array, after[path], err_msg=path)


def test_a_run_that_starts_from_factors_has_them_on_biases_too(parent: Path, tiny: Tiny, tmp_path: Path):
    tuned = train(tiny(start_from=str(parent), **ADAMW, adapter__kind="ia3", budget="12steps"), tmp_path / "tuned")
    layer = tuned.params["blocks"]["attention"]["qkv"]
    factors, start = np.asarray(layer["kernel"].outputs)[:, 0], layer["kernel"].start
    wanted = np.array(layer["bias"])
    wanted[:, start:] *= factors
    assert np.abs(wanted - np.asarray(layer["bias"])).max() > 1e-4
    rates = {name: 1e-30 for name in ("optim__lr", "optim__embed_lr", "optim__head_lr", "optim__scalar_lr")}
    run = train(tiny(start_from=str(tuned.path), **{**ADAMW, **rates}, budget="1steps"), tmp_path / "run")
    np.testing.assert_allclose(run.params["blocks"]["attention"]["qkv"]["bias"], wanted, rtol=1e-6)
    # Of float32, and the factors before and after the product.
    assert run.summary["bits_per_byte"] == pytest.approx(tuned.summary["bits_per_byte"], rel=1e-5)


def test_what_an_adapter_is_for_is_known_of_its_run(parent: Path, tiny: Tiny, tmp_path: Path):
    origin = {"imported_from": "hub:someone/small", "family": "llama"}
    base = replace(load_model(parent), origin=origin).save(tmp_path / "base")
    run = train(tiny(start_from=str(base), **LORA, budget="1steps"), tmp_path / "run")
    assert {name: run.language_model.origin[name] for name in ("base", "family")} == {
        "base": "hub:someone/small",
        "family": "llama",
    }
    # The next one starts from what the two are together, which has no name but its path.
    again = replace(run, config=replace(run.config, start_from=str(run.path))).language_model.origin
    assert (again["base"], again["family"]) == (str(run.path), "llama")
    whole = replace(run, config=replace(run.config, adapter=None)).language_model.origin
    assert whole["family"] == "llama" and "base" not in whole
    assert "family" not in load_run(parent.parent).language_model.origin


def test_checkpoints_have_the_size_of_the_adapter_and_resume_exactly(parent: Path, tiny: Tiny, tmp_path: Path):
    config = tiny(start_from=str(parent), **LORA)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(RunInterruptedError):
        train(config, tmp_path / "run", display=StopAt(11))
    adapter = sum(leaf.size for path, leaf in leaves(whole.params).items() if path.endswith(("/a", "/b")))
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    arrays = sum(path.stat().st_size for path in (newest / "state").rglob("*") if path.is_file())
    assert arrays < 3 * 4 * adapter + 60_000  # weights and two moments; Orbax's own files
    run = resume(tmp_path / "run")
    for path, array in leaves(run.params).items():
        np.testing.assert_array_equal(array, leaves(whole.params)[path], err_msg=path)
    assert run.summary["bits_per_byte"] == whole.summary["bits_per_byte"]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "kind"), [("int8", Quantised), ("nf4", NormalFloat)])
def test_bases_of_few_bits_train_nearly_as_well(parent: Path, tiny: Tiny, tmp_path: Path, base: str, kind: Any):
    exact = train(tiny(start_from=str(parent), **LORA), tmp_path / "exact")
    run = train(tiny(start_from=str(parent), **LORA, adapter__base=base), tmp_path / "run")
    packed = [leaf for leaf in jax.tree.leaves(run.params, is_leaf=is_packed) if isinstance(leaf, LowRank)]
    assert packed and all(isinstance(leaf.base, kind) for leaf in packed)
    assert run.summary["loss"] == pytest.approx(exact.summary["loss"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "adafactor"])
def test_every_optimizer_accumulates_recomputes_and_shares(parent: Path, tiny: Tiny, tmp_path: Path, optimizer: str):
    common = {**LORA, "optim__name": optimizer, "budget": "6steps", "train__log_points": 6, "start_from": str(parent)}
    one = train(tiny(**common), tmp_path / "one")
    cut = train(tiny(**common, batch__microbatch=4, train__remat="full"), tmp_path / "cut")
    many = train(tiny(**common, train__fsdp=2), tmp_path / "many")
    for other in (cut, many):
        # float32 sums in another order, through what the optimizer divides by
        assert other.summary["bits_per_byte"] == pytest.approx(one.summary["bits_per_byte"], rel=2e-3)


def test_the_second_matrix_has_its_own_rate(parent: Path, tiny: Tiny, tmp_path: Path):
    """LoRA+: after one step of Adam without decay, entries with a gradient have moved by the rate."""
    config = tiny(start_from=str(parent), **LORA, adapter__b_ratio=8.0, budget="1steps", optim__schedule="constant")
    run = train(replace(config, optim=replace(config.optim, weight_decay=0.0)), tmp_path / "run")
    b = leaves(run.params)["blocks/mlp/up/kernel/b"]
    np.testing.assert_allclose(np.abs(b).max(), 8e-2, rtol=1e-3)


@pytest.mark.slow
def test_a_merged_model_gives_the_same_text_and_scores(parent: Path, tiny: Tiny, tmp_path: Path):
    run = train(tiny(start_from=str(parent), **LORA), tmp_path / "run")
    model = run.language_model.save(tmp_path / "model")
    merged = merge_model(run, tmp_path / "merged")
    assert merged.costs == {} and not any(map(is_packed, jax.tree.leaves(merged.model.params, is_leaf=is_packed)))
    options = {"max_tokens": 12, "temperature": 0.0}
    text = generate(run, "the stack", **options)[0].text
    assert text == generate(model, "the stack", **options)[0].text
    assert text == generate(tmp_path / "merged", "the stack", **options)[0].text
    wanted = {path.removesuffix("/base") for path in leaves(run.params) if not path.endswith(("/a", "/b"))}
    assert set(leaves(load_model(tmp_path / "merged").params)) == wanted
    packed = train(tiny(start_from=str(parent), **LORA, adapter__base="int8"), tmp_path / "packed")
    costs = merge_model(packed, tmp_path / "again").costs
    assert costs and all(0 < cost < 0.02 for cost in costs.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_are_kept_resumed_and_used(parent: Path, tiny: Tiny, tmp_path: Path, kind: str):
    start = {"adapter__prompt_start": "text", "adapter__prompt_text": "the stack"} if kind == "prompt" else {}
    config = tiny(start_from=str(parent), **VIRTUAL, adapter__kind=kind, **start, budget="8steps")
    whole = train(config, tmp_path / "whole")
    assert whole.config.data.sequence_length == 32 - 4  # the parent sees 32 tokens
    with pytest.raises(RunInterruptedError):
        train(config, tmp_path / "run", display=StopAt(3))
    run = resume(tmp_path / "run")
    for path, array in leaves(run.params).items():
        np.testing.assert_array_equal(array, leaves(whole.params)[path], err_msg=path)
    model = run.language_model.save(tmp_path / "model")
    options = {"max_tokens": 40, "temperature": 0.0}  # more than the context
    assert generate(run, "the stack", **options)[0].text == generate(model, "the stack", **options)[0].text
    (tmp_path / "text.txt").write_text("the stack walks block by block", encoding="utf-8")
    scores = [evaluate_text(each, tmp_path / "text.txt").bits_per_byte for each in (run, model)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    with pytest.raises(ModelError, match="4 virtual tokens beside it"):
        merge_model(run, tmp_path / "merged")
    with pytest.raises(ModelError, match="of 4 virtual tokens, which would be lost"):
        train(tiny(start_from=str(model), **LORA), tmp_path / "again")


@pytest.mark.slow
def test_preferences_are_learned(parent: Path, tiny: Tiny, tmp_path: Path):
    words = "the stack walks block by block and every token pays".split()
    rows = [
        {"prompt": f"say {a} {b}:", "chosen": f" stack {b}", "rejected": f" token {b}"}
        for a in words
        for b in words
        if a != b
    ]
    turns = [{"role": "user", "content": "go"}]
    answers = ({"role": "assistant", "content": text} for text in ("stack", "token"))
    chosen, rejected = ([answer] for answer in answers)
    rows += [{"prompt": turns, "chosen": chosen, "rejected": rejected}]
    rows += [{"chosen": [*turns, *chosen], "rejected": [*turns, *rejected]}]
    file = tmp_path / "preferences.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {"examples__source": str(file), "examples__format": "preference", "data__sequence_length": 32}
    config = tiny(start_from=str(parent), **LORA, **given, budget="24steps")
    run = train(config, tmp_path / "run")
    assert run.config.objective.kind == "preference"
    scores = [record for record in read_records(run.path) if record["kind"] == "evaluate"]
    first = next(record for record in read_records(run.path) if record["kind"] == "train")
    assert first["loss"] == pytest.approx(np.log(2), rel=0.05)  # the base is the reference
    assert scores[-1]["loss"] < 0.6 and scores[-1]["accuracy"] > 0.8
    # A pair is no text: nothing is per byte, in training and held out, and what is written of the run says so.
    found = evaluate_text(run)
    assert isinstance(found, PairEvaluation) and str(found).startswith(f"accuracy {found.accuracy:.1%} (loss ")
    assert found.loss == pytest.approx(run.summary["loss"]) and 0 < found.pairs < len(rows) / 10
    for record in read_records(run.path):
        assert record.get("bits_per_byte") is None and "perplexity" not in record
    assert not {"bits_per_byte", "perplexity"} & run.summary.keys()
    axes = run.plot().figure.axes[0]
    assert axes.get_title(loc="left") == "Accuracy" and len(axes.lines[0].get_xydata()) == len(scores)
    told = Told()
    finish(run, told)
    assert any(line.startswith("held-out preferences: accuracy ") for line in told.lines)
    card = (run.path / "model" / "README.md").read_text(encoding="utf-8")
    for text in (card, (run.path / "report.html").read_text(encoding="utf-8"), *told.lines):
        assert "per byte" not in text and "per token" not in text
    with pytest.raises(ConfigError, match=r"examples.format is preference, and adapter is not given: answers"):
        train(tiny(start_from=str(parent), **ADAMW, **given), tmp_path / "full")
    rows[0]["rejected"] = rows[0]["chosen"]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError, match=r"preferences.jsonl.*both answers are the same"):
        train(config, tmp_path / "same")


def test_what_an_adapter_needs_is_said(parent: Path, tiny: Tiny, tmp_path: Path):
    model = shutil.copytree(parent, tmp_path / "model")
    run = train(tiny(start_from=str(model), **LORA, budget="4steps"), tmp_path / "run")
    index = model / "weights.index.json"
    index.write_text(index.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(RunError, match="was trained beside other weights than .* now holds: put those back"):
        load_run(run.path)
    shutil.rmtree(model)
    with pytest.raises(RunError, match="belongs to the weights of .*, which are not there any more"):
        resume(run.path, budget="8steps")
    with pytest.raises(
        ConfigError, match=r"this recipe fine-tunes a model, and none is given: cramjax tune MODEL RECIPE"
    ):
        train(tiny(**LORA), tmp_path / "none")
    with pytest.raises(ConfigError, match=r"no matrix's path matches 'blocks/mlps/\*'.* blocks/mlp/up/kernel"):
        train(tiny(start_from=str(parent), **LORA, adapter__targets=["blocks/mlps/*"]), tmp_path / "targets")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optim__name": "adalomo", "optim__ema": 0.0}, "optim.name=adalomo updates every weight"),
        ({"optim__name": "adamw", "train__offload_optimizer": True}, "train.offload_optimizer updates every weight"),
        ({"optim__name": "adalomo", "train__param_dtype": "bfloat16"}, "optim.name=adalomo updates every weight"),
        ({"adapter__kind": "ia3", "adapter__rank": 8}, "adapter.rank is 8, but adapter.kind is ia3"),
    ],
)
def test_what_an_adapter_excludes_is_refused_by_name(tiny: Tiny, options: dict[str, Any], words: str):
    given = {"adapter__kind": "lora", "batch__microbatch": 8, **options}
    with pytest.raises(ConfigError, match=words):
        tiny(**given)


def test_plans_count_what_is_trained(tiny: Tiny):
    def memory(**options: Any) -> Any:
        return estimate_memory(tiny(**ADAMW, **options), vocab_size=300, compute_dtype="float32", gpu=None)

    whole, adapter = memory(), memory(adapter__kind="lora", adapter__rank=2)
    assert adapter.by_kind["optimizer"] < whole.by_kind["optimizer"] / 2
    packed = memory(adapter__kind="lora", adapter__rank=2, adapter__base="nf4")
    assert packed.by_kind["weights"] < adapter.by_kind["weights"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions of a format that no text has."""
    file = tmp_path_factory.mktemp("examples") / "questions.jsonl"
    words = "the stack walks block by block and every token pays for its own place in the budget".split()
    rows = [{"prompt": f"say {a} {b}:", "completion": f" [{b} {a}]"} for a in words for b in words[:8]]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("options", [ADAMW, LORA], ids=["full", "lora"])
def test_a_run_on_examples_predicts_completions_and_resumes_exactly(
    parent: Path, tiny: Tiny, tmp_path: Path, questions: Path, options: dict[str, Any]
):
    chosen = {**options, "examples__source": str(questions), "examples__format": "completion", "budget": "40steps"}
    config = tiny(start_from=str(parent), **chosen)
    whole = train(config, tmp_path / "whole")
    scores = [record for record in read_records(whole.path) if record["kind"] == "evaluate"]
    assert scores[-1]["loss"] < scores[0]["loss"] and scores[-1]["accuracy"] > 0.3
    assert whole.summary["bits_per_byte"] == pytest.approx(evaluate_text(whole.path).bits_per_byte, rel=1e-6)
    with pytest.raises(RunInterruptedError):
        train(config, tmp_path / "run", display=StopAt(17))
    run = finish(resume(tmp_path / "run"))
    for path, array in leaves(run.params).items():
        np.testing.assert_array_equal(array, leaves(whole.params)[path], err_msg=path)
    assert run.summary["baselines"] == {} and (run.path / "report.html").is_file()
    text = {"max_tokens": 8, "temperature": 0.0}
    assert generate(run, "say a b:", **text)[0].text == generate(run.path / "model", "say a b:", **text)[0].text


def test_conversations_keep_their_template(parent: Path, tiny: Tiny, tmp_path: Path):
    rows = [
        {"messages": [{"role": "user", "content": f"number {i}"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(60)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {"examples__source": str(tmp_path / "chat.jsonl"), "data__sequence_length": 32, "budget": "4steps"}
    run = train(tiny(start_from=str(parent), **LORA, **given, batch__size=4, batch__microbatch=4), tmp_path / "run")
    template = load_model(run.language_model.save(tmp_path / "model")).chat_template
    assert template is not None and "add_generation_prompt" in template
    assert template == load_run(run.path).language_model.chat_template
    answer = generate(run, ["number 3", "number 4"], chat=True, max_tokens=4, temperature=0.0)
    # What the plain template makes of it, up to where the answer begins.
    asked = generate(run, ["User:\nnumber 3\n\nAssistant:\n"], max_tokens=4, temperature=0.0)
    assert answer[0].text == asked[0].text and answer[0].prompt == "number 3"
    with pytest.raises(RunError, match="has no chat template"):
        generate(parent, "number 3", chat=True)


def test_what_examples_need_is_said(parent: Path, tiny: Tiny, tmp_path: Path, questions: Path):
    with pytest.raises(ConfigError, match="examples.source must name the examples to tune on"):
        train(tiny(start_from=str(parent), **LORA, examples__format="completion"), tmp_path / "a")
    said = r"questions.jsonl.*its fields \(prompt, completion\) are those of examples.format=completion"
    with pytest.raises(DataError, match=said):
        train(tiny(start_from=str(parent), **LORA, examples__source=str(questions)), tmp_path / "b")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
