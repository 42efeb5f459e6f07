"""Codes in other files: compressed-tensors by `transformers`, GPTQ's layout by a reader of its own; and back."""

import json
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
from cramjax.cli import main
from cramjax.errors import ModelError
from cramjax.formats.bits import packed, unpacked_codes
from cramjax.formats.quantised import reader_of
from cramjax.kernels.packed import pack, quantise
from cramjax.language_model import LanguageModel

MakeModel = Callable[..., LanguageModel]
LLAMA: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu", "tied": False}
TOKENS = np.random.default_rng(0).integers(3, 290, (2, 24))


def quantised(
    model_of: MakeModel, bits: int, group: int | None, symmetric: bool = True, **fields: Any
) -> LanguageModel:
    model = model_of(**{**LLAMA, **fields})
    options = {"symmetric": symmetric, "scale_dtype": jnp.bfloat16}
    params = pack(model.params, model.model.weights, f"int{bits}", group, **options)  # pyright: ignore[reportArgumentType]
    return replace(model, params=params)


def logits_of(model: LanguageModel) -> np.ndarray:
    hidden = jax.jit(model.model.hidden)(model.params, jnp.asarray(TOKENS, jnp.int32))
    return np.asarray(model.model.logits(model.params, hidden))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_stream_of_bits_is_packed_low_bits_first(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 45)).astype(np.uint8)
    words = packed(codes, bits)
    for row, own in zip(words, codes, strict=True):
        whole = sum(int(np.uint32(word)) << 32 * place for place, word in enumerate(row))
        assert [whole >> bits * place & (2**bits - 1) for place in range(45)] == own.tolist()
    np.testing.assert_array_equal(unpacked_codes(words, bits, 45), codes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 16, True), (3, 16, False), (8, None, True)])
def test_transformers_reads_compressed_tensors(
    model_of: MakeModel, tmp_path: Path, bits: int, group: int | None, symmetric: bool
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")
    pytest.importorskip("compressed_tensors", reason="needs the `parity` extra")
    torch = pytest.importorskip("torch", reason="needs the `parity` extra")
    model = quantised(model_of, bits, group, symmetric)
    out = model.export(tmp_path / "out", "compressed-tensors")
    expected = logits_of(model)
    options = {}
    if not symmetric:  # their zero points load unpacked alone
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    their = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        found = their(input_ids=torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(logits_of(import_model(out)), expected, atol=1e-5, rtol=1e-5)


def gptq_weight(tensors: dict[str, np.ndarray], stem: str, bits: int, added: int) -> np.ndarray:
    """A matrix (in, out) of GPTQ's layout, a code at a time."""
    words, zeros = tensors[f"{stem}.qweight"].astype(np.uint32), tensors[f"{stem}.qzeros"].astype(np.uint32)
    scales, group_of = tensors[f"{stem}.scales"].astype(np.float64), tensors[f"{stem}.g_idx"]
    inner, out = len(group_of), scales.shape[1]

    def code(row: np.ndarray, place: int) -> int:
        stream = sum(int(word) << 32 * at for at, word in enumerate(row))
        return stream >> bits * place & (2**bits - 1)

    weight = np.zeros((inner, out))
    for i in range(inner):
        for o in range(out):
            group = group_of[i]
            weight[i, o] = (code(words[:, o], i) - (code(zeros[group], o) + added)) * scales[group, o]
    return weight


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, True), (3, False)])
def test_gptq_has_the_codes_of_the_model(model_of: MakeModel, tmp_path: Path, bits: int, symmetric: bool) -> None:
    model = quantised(model_of, bits, 16, symmetric)
    out = model.export(tmp_path / "out", "gptq")
    said = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (said["bits"], said["group_size"], said["sym"], said["checkpoint_format"]) == (
        bits,
        16,
        symmetric,
        "gptq_v2",
    )
    tensors = safetensors.numpy.load_file(out / "model.safetensors")
    kernel = np.asarray(model.params["blocks"]["mlp"]["down"]["kernel"].unpacked()[1])
    np.testing.assert_allclose(gptq_weight(tensors, "model.layers.1.mlp.down_proj", bits, 0), kernel, rtol=1e-6)
    expected = logits_of(model)
    np.testing.assert_allclose(logits_of(import_model(out)), expected, atol=1e-5, rtol=1e-5)
    if symmetric:  # the first version has zeros that are one less, and some wrote them, or not, under the other's name
        older = {name: x - _ones(bits) if name.endswith("qzeros") else x for name, x in tensors.items()}
        assert gptq_weight(older, "model.layers.1.mlp.down_proj", bits, 1) == pytest.approx(kernel, rel=1e-6)
        for name, given in (("gptq", older), ("gptq", tensors), ("gptq_v2", tensors)):
            safetensors.numpy.save_file(given, out / "model.safetensors", {"format": "pt"})
            _rewrite(out, quantization_config={**said, "checkpoint_format": name})
            np.testing.assert_allclose(logits_of(import_model(out)), expected, atol=1e-5, rtol=1e-5)


def _ones(bits: int) -> np.int32:
    """1 in each code of a word."""
    return np.uint32(sum(1 << place for place in range(0, 32, bits))).astype(np.int32)


def _rewrite(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")


def test_groups_by_act_order_are_read(model_of: MakeModel, tmp_path: Path) -> None:
    model = quantised(model_of, 4, 16)
    out = model.export(tmp_path / "out", "gptq")
    tensors = safetensors.numpy.load_file(out / "model.safetensors")
    stem = "model.layers.0.self_attn.q_proj"
    tensors[f"{stem}.g_idx"] = np.random.default_rng(0).permutation(tensors[f"{stem}.g_idx"])
    safetensors.numpy.save_file(tensors, out / "model.safetensors", {"format": "pt"})
    read = import_model(out).params["blocks"]["attention"]["qkv"]["kernel"][0]
    np.testing.assert_allclose(read[:, :32], gptq_weight(tensors, stem, 4, 0), rtol=1e-6)


def test_what_cannot_be_written_or_read_is_said(
    model_of: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = quantised(model_of, 4, 16)
    mixed = {**model.params, "blocks": dict(model.params["blocks"])}
    mlp = mixed["blocks"]["mlp"]
    mixed["blocks"]["mlp"] = {**mlp, "down": {"kernel": quantise(mlp["down"]["kernel"].unpacked(), 8, 16)}}
    with pytest.raises(ModelError, match="here there are 2 .*compress the model with one --bits"):
        replace(model, params=mixed).export(tmp_path / "a", "gptq")
    with pytest.raises(ModelError, match="here there are 0 .*none is of 8, 4, 3 or 2 bits"):
        model_of(**LLAMA).export(tmp_path / "a", "compressed-tensors")
    with pytest.raises(ModelError, match="nn.Linear, which this class does not use"):
        quantised(
            model_of,
            4,
            16,
            norm="layernorm",
            activation="gelu_tanh",
            positions="learned",
            bias=True,
            kv_heads=None,
            tied=True,
        ).export(tmp_path / "a", "compressed-tensors")
    exact = pack(model_of(**LLAMA).params, model.model.weights, "int4", 16)
    with pytest.raises(ModelError, match=r"scales in float16.*--scale_dtype=bfloat16"):
        replace(model, params=exact).export(tmp_path / "a", "gptq")
    assert not (tmp_path / "a").exists()
    for config, words in (
        ({"quant_method": "bitsandbytes"}, "quant_method is bitsandbytes"),
        ({"quant_method": "gptq", "bits": 5}, "have 5 bits, and read are 2, 3, 4, 8"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "format float-quantized"),
        ({"quant_method": "gptq"}, "quantization_config is damaged"),
    ):
        with pytest.raises(ModelError, match=words):
            reader_of(config)
    out = model.export(tmp_path / "out", "compressed-tensors")
    _rewrite(out, quantization_config={"bits": 4})
    with pytest.raises(ModelError, match="the model is quantised, and cannot be read so.* quant_method is None"):
        import_model(out)
    model.save(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "hf")]) == 2
    assert "--format gguf, compressed-tensors or gptq" in capsys.readouterr().err
