"""Exports: logits and tokens by `transformers`, the same weights when they are imported again, what has no class."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax import import_model
from cramjax.config import RopeScaling
from cramjax.errors import ModelError
from cramjax.language_model import LanguageModel, load_model
from cramjax.recipes import load_recipe

_EXTRA = "needs the `parity` extra: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=_EXTRA)
transformers = pytest.importorskip("transformers", reason=_EXTRA)

MakeModel = Callable[..., LanguageModel]

LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "tied": False}
PLAIN = {"norm": "rmsnorm", "norm_affine": False, "activation": "relu2", "qk_norm": True}
BERT = {
    "norm_position": "post",
    "positions": "learned",
    "bias": True,
    "activation": "gelu",
    "embedding_norm": True,
    "final_norm": False,
    "head_transform": True,
    "head_bias": True,
    "token_types": 2,
}

GEMMA3 = {
    "norm": "rmsnorm",
    "norm_position": "sandwich",
    "activation": "geglu_tanh",
    "qk_norm": True,
    "embedding_scale": 32**0.5,
}
YARN = RopeScaling("yarn", factor=4.0, original_positions=16)

# Fields of a model of ours → the class that computes it.
OURS: list[tuple[str, dict[str, Any]]] = [
    ("GPT2LMHeadModel", {"positions": "learned", "bias": True}),
    ("GPT2LMHeadModel", {"positions": "sinusoidal", "activation": "relu2", "norm_affine": False, "tied": False}),
    ("LlamaForCausalLM", LLAMA),
    ("LlamaForCausalLM", {**LLAMA, "kv_heads": 1, "head_dim": 8, "tied": True, "norm_affine": False}),
    ("LlamaForCausalLM", {**LLAMA, "mup_base_width": 16, "mup_base_head_dim": 8}),
    ("MistralForCausalLM", {**LLAMA, "window": 5}),
    ("NanoChatForCausalLM", {**PLAIN, "embedding_norm": True, "logit_softcap": 2.0}),
    ("NanoChatForCausalLM", {**PLAIN, "embedding_norm": True, "mup_base_width": 8}),
    ("Qwen3ForCausalLM", PLAIN),  # gpt-1.3b's family
    ("Qwen3ForCausalLM", {**PLAIN, "mup_base_width": 16, "mup_base_head_dim": 8}),
    ("Gemma3ForCausalLM", GEMMA3),
    ("NanoChatForCausalLM", {**PLAIN, "embedding_norm": True, "rope_scaling": replace(YARN, attention_factor=1.0)}),
    ("BertForMaskedLM", BERT),
    ("BertForMaskedLM", {**BERT, "token_types": 0, "head_bias": False, "bias": False}),
]


def logits_of(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    hidden = jax.jit(model.model.hidden)(model.params, jnp.asarray(tokens, jnp.int32))
    return np.asarray(model.model.logits(model.params, hidden))


def logits_by_transformers(path: Path, kind: str, tokens: np.ndarray) -> np.ndarray:
    auto = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModelForMaskedLM
    their, report = auto.from_pretrained(path, output_loading_info=True)
    # BERT's pooler is not used for masked tokens.
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        return their.eval()(input_ids=torch.tensor(tokens)).logits.numpy()


def same_weights(a: LanguageModel, b: LanguageModel) -> None:
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


@pytest.mark.parametrize(("class_", "fields"), OURS, ids=lambda given: given if isinstance(given, str) else "")
def test_ours_by_transformers(model_of: MakeModel, tmp_path: Path, class_: str, fields: dict[str, Any]) -> None:
    kind = "masked" if class_.startswith("Bert") else "causal"
    model = model_of(kind, **fields)
    model.export(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["architectures"] == [class_]
    tokens = np.random.default_rng(0).integers(3, model.model.vocab_size, (2, 24))
    expected = logits_of(model, tokens)
    np.testing.assert_allclose(logits_by_transformers(tmp_path / "out", kind, tokens), expected, atol=2e-5, rtol=2e-5)
    again = import_model(tmp_path / "out")
    np.testing.assert_allclose(logits_of(again, tokens), expected, atol=2e-5, rtol=2e-5)
    again.export(tmp_path / "twice")
    same_weights(import_model(tmp_path / "twice"), again)


def test_the_tokenizer_and_its_special_tokens(model_of: MakeModel, tmp_path: Path) -> None:
    model = model_of(**LLAMA)
    model.export(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = model.tokenizer
    text = "the stack walks, block by token"
    assert tokenizer(text)["input_ids"] == [*ours.opening(), *ours.encode(text)]
    assert tokenizer.decode(ours.encode(text)) == text
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (ours.separator_id, ours.mask_id)
    again = import_model(tmp_path / "out").tokenizer
    assert again.separator_id == ours.separator_id and again.mask_id == ours.mask_id and again.pad_id == ours.pad_id
    assert again.opening() == ours.opening() and again.ends == ours.ends


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"positions": "learned", "bias": True}, LLAMA, PLAIN], ids=["gpt2", "llama", "qwen"]
)
def test_greedy_generation_is_that_of_transformers(model_of: MakeModel, tmp_path: Path, fields: dict[str, Any]) -> None:
    from cramjax.serve import generate

    model = model_of(context=96, **fields)
    model.export(tmp_path / "out")
    their = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = "the stack walks"
    banned = [[token] for token in {model.tokenizer.mask_id, model.tokenizer.pad_id} - {model.tokenizer.separator_id}]
    options = {"max_new_tokens": 64, "do_sample": False, "temperature": None, "bad_words_ids": banned}
    ids = tokenizer(prompt, return_tensors="pt")
    whole = their.generate(**{key: ids[key] for key in ("input_ids", "attention_mask")}, **options)[0].tolist()
    drawn = whole[len(ids["input_ids"][0]) :]
    result = generate(tmp_path_model(model, tmp_path), prompt, max_tokens=64, temperature=0.0)[0]
    assert result.tokens == len(drawn)
    assert prompt + result.text == tokenizer.decode(whole, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.3])
def test_beam_search_is_that_of_transformers(model_of: MakeModel, tmp_path: Path, penalty: float) -> None:
    from cramjax.serve import BeamSearch, beam_search

    model = model_of(context=64, **LLAMA)
    model.export(tmp_path / "out")
    their = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = "the stack walks"
    banned = [[token] for token in {model.tokenizer.mask_id, model.tokenizer.pad_id} - {model.tokenizer.separator_id}]
    options = {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 4, "do_sample": False, "temperature": None}
    options |= {"early_stopping": "never", "length_penalty": penalty, "bad_words_ids": banned}
    ids = tokenizer(prompt, return_tensors="pt")
    ids = {key: ids[key] for key in ("input_ids", "attention_mask")}
    whole = their.generate(**ids, **options, return_dict_in_generate=True, output_scores=True)
    (found,) = beam_search(tmp_path_model(model, tmp_path), prompt, BeamSearch(4, penalty), max_tokens=12)
    assert len(found) == 4
    for own, tokens, score in zip(found, whole.sequences, whole.sequences_scores.tolist(), strict=True):
        drawn = tokens.tolist()[len(ids["input_ids"][0]) :]
        assert list(own.tokens) == drawn[: len(own.tokens)]
        assert set(drawn[len(own.tokens) :]) <= {model.tokenizer.pad_id, model.tokenizer.separator_id}
        assert own.score == pytest.approx(score, abs=1e-4)


def tmp_path_model(model: LanguageModel, tmp_path: Path) -> Path:
    """The model as a model directory that was imported from its own export."""
    import_model(tmp_path / "out", tmp_path / "model")
    same_weights(load_model(tmp_path / "model"), import_model(tmp_path / "out"))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedding_skip": True}, "no class has model.embedding_skip=true"),
        ({"adaptive_head": (64, 128), "tied": False}, r"no class has .*model.adaptive_head=\[64, 128\]"),
        ({"value_embeddings": True, "bigram_buckets": 16}, "no class has .*model.value_embeddings=true"),
        ({**PLAIN, "logit_softcap": 15.0}, "the nearest, has no model.embedding_norm=false"),
        ({**GEMMA3, "attention_softcap": 5.0}, "Gemma2ForCausalLM, the nearest, has no model.qk_norm=true"),
        ({**PLAIN, "embedding_norm": True, "rope_scaling": YARN}, "has no model.rope_scaling=.*yarn"),
        ({"positions": "learned", "bias": True, "window": 5}, "no model.window=5"),
        # BERT's class has its activation in its head as well, where ours is always GELU.
        ({**BERT, "kind": "masked", "activation": "gelu_tanh"}, 'no .*model.activation="gelu_tanh"'),
    ],
)
def test_what_has_no_class_is_named(model_of: MakeModel, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model_of(**fields).export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "changes", "class_"),
    [
        ("gpt-1.3b", {}, "Qwen3ForCausalLM"),
        ("gpt-124m", {"model.embedding_norm": True}, "NanoChatForCausalLM"),
        ("gpt-124m", {"model.logit_softcap": None}, "Qwen3ForCausalLM"),
        ("gpt-mini", {"model.embedding_skip": False, "model.adaptive_head": []}, "NanoChatForCausalLM"),
        ("quickstart", {"model.embedding_skip": False, "model.adaptive_head": []}, "NanoChatForCausalLM"),
        ("llama-7b", {}, "LlamaForCausalLM"),
        ("llama-13b", {}, "LlamaForCausalLM"),
        ("gpt-124m", {}, None),
        ("gpt-mini", {}, None),
        ("crammed-bert", {}, None),
    ],
)
def test_the_class_of_a_recipe(recipe: str, changes: dict[str, Any], class_: str | None) -> None:
    """Which recipes have a class, and which field keeps one from it."""
    from cramjax.formats.export import nearest
    from cramjax.formats.families import FAMILIES
    from cramjax.formats.family import Architecture

    config = load_recipe(recipe, changes)
    kind = config.objective.kind
    given = Architecture(config.model, 50_304, config.data.sequence_length, kind)
    fits = [nearest(family, given) for family in FAMILIES.values() if kind in family.classes]
    exact = next((fit.class_ for fit in fits if fit is not None and not fit.differences), None)
    assert exact == class_


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_an_export_that_cannot_be_written_leaves_nothing(
    model_of: MakeModel, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cramjax.formats import export

    name = {"model.safetensors": "write_safetensors", "tokenizer.json": "write_tokenizer"}[file]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, name, full)
    with pytest.raises(ModelError, match="no space is left on the device"):
        model_of(**LLAMA).export(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        model_of(**LLAMA).export(tmp_path / "out")
