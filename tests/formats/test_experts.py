"""Models of experts: fused and unfused files, both ways against `transformers`, and what has no counterpart."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cramjax import import_model
from cramjax.config import LayerConfig
from cramjax.errors import ConfigError, ModelError
from cramjax.experts import ExpertsConfig
from cramjax.formats.families import read_architecture
from cramjax.formats.table import flatten, unflatten
from cramjax.kernels.packed import pack
from cramjax.language_model import LanguageModel

from . import models
from .test_export import logits_by_transformers, logits_of
from .test_import import tokenizer_files

torch = pytest.importorskip("torch", reason="needs the `parity` extra: pip install -e '.[parity]'")
pytest.importorskip("transformers", reason="needs the `parity` extra: pip install -e '.[parity]'")

MakeModel = Callable[..., LanguageModel]
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "tied": False}
EXPERTS = ExpertsConfig(number=4, active=2, width=24, scores="softmax", balance="loss")
OURS: list[tuple[str, dict[str, Any]]] = [
    ("MixtralForCausalLM", {"experts": replace(EXPERTS, normalised=True), "window": 5}),
    (
        "Qwen2MoeForCausalLM",
        {"experts": replace(EXPERTS, shared=2, shared_gate=True, every=2), "layers": 4, "qkv_bias": True},
    ),
    (
        "Qwen3MoeForCausalLM",
        {
            "experts": replace(EXPERTS, active=1, balance="none"),
            "pattern": (LayerConfig(experts=False), LayerConfig()),
            "qk_norm": True,
        },
    ),
]
TOKENS = np.random.default_rng(0).integers(3, 290, (2, 24))


def without_biases(model: LanguageModel) -> LanguageModel:
    """Of its routers."""
    leaves = {
        path: jnp.zeros_like(leaf) if path.endswith("router/bias") else leaf for path, leaf in flatten(model.params)
    }
    return replace(model, params=unflatten(leaves, model.params))


@pytest.mark.parametrize("kind", ["mixtral", "qwen2-experts"])
def test_files_with_all_experts_in_one_tensor(tmp_path: Path, kind: str) -> None:
    """As transformers 5 has them in memory, and may write them; else it writes each by itself."""
    their = models.seeded(kind)
    their.save_pretrained(tmp_path / "apart")
    apart = safetensors.numpy.load_file(tmp_path / "apart" / "model.safetensors")
    assert any(".experts.3." in name for name in apart)
    (tmp_path / "one").mkdir()
    state = {name: np.ascontiguousarray(array) for name, array in models.arrays(their.state_dict().items()).items()}
    safetensors.numpy.save_file(state, tmp_path / "one" / "model.safetensors", {"format": "pt"})
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    (tmp_path / "one" / "config.json").write_bytes((tmp_path / "apart" / "config.json").read_bytes())
    read = []
    for name in ("apart", "one"):
        tokenizer_files(tmp_path / name, sep_token="w2", mask_token="w4")
        read.append(import_model(tmp_path / name).params)
    jax.tree.map(np.testing.assert_array_equal, *read)


@pytest.mark.slow
@pytest.mark.parametrize(("named", "fields"), OURS, ids=[name for name, _ in OURS])
def test_exports(model_of: MakeModel, tmp_path: Path, named: str, fields: dict[str, Any]) -> None:
    given = without_biases(model_of(**{**LLAMA, **fields}))
    given.export(tmp_path / "hf")
    assert named in (tmp_path / "hf" / "config.json").read_text(encoding="utf-8")
    expected = logits_of(given, TOKENS)
    np.testing.assert_allclose(logits_by_transformers(tmp_path / "hf", "causal", TOKENS), expected, atol=2e-5)
    np.testing.assert_allclose(logits_of(import_model(tmp_path / "hf"), TOKENS), expected, atol=1e-6)


@pytest.mark.slow
def test_experts_of_codes_come_back(model_of: MakeModel, tmp_path: Path) -> None:
    given = without_biases(model_of(**{**LLAMA, **OURS[1][1]}))
    given = replace(given, params=pack(given.params, given.model.weights, "int4", 8, scale_dtype=jnp.bfloat16))
    expected = logits_of(given, TOKENS)
    for layout in ("compressed-tensors", "gptq"):
        out = given.export(tmp_path / layout, layout)  # pyright: ignore[reportArgumentType]
        for codes in (False, True):
            found = import_model(out, codes=codes)
            np.testing.assert_allclose(logits_of(found, TOKENS), expected, atol=1e-5)
        assert found.origin["codes"] == "of 10 of 10 stacks of matrices"


def test_what_no_class_has_is_named(model_of: MakeModel, tmp_path: Path) -> None:
    for fields, words in (
        ({"experts": replace(EXPERTS, scores="sigmoid")}, 'no class has model.experts=.*"scores": "sigmoid"'),
        ({"experts": EXPERTS, "logit_softcap": 5.0, "qk_norm": True}, "model.logit_softcap=5.0"),
        ({"experts": replace(EXPERTS, shared=1), "qkv_bias": True}, 'model.experts=.*"shared_gate": false'),
    ):
        with pytest.raises(ModelError, match=words):
            without_biases(model_of(**{**LLAMA, **fields})).export(tmp_path / "a")
    with pytest.raises(ModelError, match=r"blocks/experts/router/bias is not 0.* model.experts.balance=loss"):
        model_of(**{**LLAMA, **OURS[0][1]}).export(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ConfigError, match="shared_gate is true, and there are no shared experts"):
        from cramjax.recipes import load_recipe

        load_recipe("moe-mini", {"model.experts.shared": 0, "model.experts.shared_gate": True})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 1}, "whose weight is always 1"),
        ("mixtral", {"num_local_experts": None}, "must give num_local_experts as a number"),
        ("qwen2-experts", {"shared_expert_intermediate_size": 40}, "40 is not a multiple of moe_intermediate_size=32"),
        ("qwen3-experts", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3-experts", {"model_type": "olmoe"}, "'olmoe' cannot be read .its norms of queries and keys"),
    ],
)
def test_options_without_a_counterpart(kind: str, change: dict[str, Any], message: str) -> None:
    config = models.theirs(kind).config.to_dict()
    with pytest.raises(ModelError, match=message):
        read_architecture({**config, **change})
