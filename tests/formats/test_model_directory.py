"""Model directories: what is written is read again to the bit, bad ones are one message, and all that use them."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import cramjax
from cramjax.cli import main
from cramjax.errors import RunError, UserError
from cramjax.formats.tensors import open_safetensors
from cramjax.language_model import LanguageModel, load_model, save_model
from cramjax.serve import fill_mask, generate
from cramjax.serve.engine import Engine

MakeModel = Callable[..., LanguageModel]


def same(a: LanguageModel, b: LanguageModel) -> None:
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert jax.tree.map(lambda p: p.dtype, a.params) == jax.tree.map(lambda p: p.dtype, b.params)
    assert (a.model, a.kind, a.context, a.normalize, a.mask_rate) == (
        b.model,
        b.kind,
        b.context,
        b.normalize,
        b.mask_rate,
    )
    assert a.tokenizer.to_json() == b.tokenizer.to_json()
    roles = ("separator_id", "mask_id", "pad_id", "begin_ids", "end_ids")
    assert all(getattr(a.tokenizer, role) == getattr(b.tokenizer, role) for role in roles)
    assert a.chat_template == b.chat_template and dict(a.origin) == dict(b.origin)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_loaded(model_of: MakeModel, tmp_path: Path, param_dtype: str) -> None:
    made = model_of(param_dtype=param_dtype, tied=False, adaptive_head=(64, 128), value_embeddings=True)
    given = dataclasses.replace(made, chat_template="{{ messages }}", origin={"scores": {"bits": 1.5}}, normalize="nfc")
    assert save_model(given, tmp_path / "model", shard_bytes=20_000) == tmp_path / "model"
    assert len(list((tmp_path / "model").glob("weights-*.safetensors"))) > 3
    same(load_model(tmp_path / "model"), given)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_pattern_and_a_single_file(model_of: MakeModel, tmp_path: Path) -> None:
    from cramjax.config import LayerConfig

    given = model_of(pattern=(LayerConfig(window=5), LayerConfig(rotary=False)), layers=4)
    given.save(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").glob("*.safetensors")] == ["weights-00001-of-00001.safetensors"]
    same(cramjax.load(tmp_path / "model"), given)  # pyright: ignore[reportArgumentType]


def test_the_files_are_read_by_others(model_of: MakeModel, tmp_path: Path) -> None:
    from safetensors import safe_open

    given = model_of(param_dtype="bfloat16")
    given.save(tmp_path / "model")
    with safe_open(next((tmp_path / "model").glob("*.safetensors")), framework="np") as file:
        assert set(file.keys()) == set(open_safetensors((tmp_path / "model").glob("*.safetensors")).names)
        table = file.get_tensor("embed/token/table")
    np.testing.assert_array_equal(table, given.params["embed"]["token"]["table"])


def test_weights_go_straight_to_their_shards(model_of: MakeModel, tmp_path: Path) -> None:
    given = model_of()
    given.save(tmp_path / "model")
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = jax.tree.map(
        lambda p: NamedSharding(mesh, PartitionSpec(*[None] * (p.ndim - 1), "fsdp" if p.shape[-1] % 8 == 0 else None)),
        given.params,
    )
    loaded = load_model(tmp_path / "model", shardings)
    assert loaded.params["blocks"]["mlp"]["up"]["kernel"].sharding.is_equivalent_to(
        shardings["blocks"]["mlp"]["up"]["kernel"], 3
    )
    same(loaded, given)


@pytest.fixture(scope="module")
def saved(model_of: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory."""
    return model_of().save(tmp_path_factory.mktemp("models") / "model")


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(bytes(raw))


def _other_index(path: Path) -> None:
    index = json.loads(path.read_text(encoding="utf-8"))
    del index["weight_map"]
    path.write_text(json.dumps(index), encoding="utf-8")


def _edit(old: str, new: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        assert old in path.read_text(encoding="utf-8")
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")

    return edit


WEIGHTS = "weights-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (WEIGHTS, _flip, "is damaged: the bytes of the tensor"),
        (WEIGHTS, lambda p: p.write_bytes(p.read_bytes()[:-7]), "not a whole safetensors file .the tensor"),
        (WEIGHTS, lambda p: p.write_bytes(p.read_bytes()[:100]), "its header ends at byte"),
        (WEIGHTS, lambda p: p.write_bytes(b""), "does not start with the length of a header"),
        (WEIGHTS, lambda p: p.write_bytes(b"\x20" + bytes(7) + b"x" * 40), "its header cannot be read"),
        (WEIGHTS, Path.unlink, "weights-00001-of-00001.safetensors does not exist"),
        ("weights.index.json", lambda p: p.write_text("{", encoding="utf-8"), "is damaged .it is not JSON"),
        ("weights.index.json", _other_index, "weights.index.json is damaged"),
        ("weights.index.json", Path.unlink, "weights.index.json does not exist"),
        ("model.yaml", Path.unlink, "it has no config.yaml"),
        ("model.yaml", lambda p: p.write_bytes(b"\xff\xfe"), "model.yaml is not text"),
        ("model.yaml", lambda p: p.write_text("- a", encoding="utf-8"), "must be a YAML mapping"),
        ("model.yaml", _edit("format: 1", "format: 9"), "is of format 9, and this version reads 1"),
        ("model.yaml", _edit("kind: causal", "kind: novel"), "kind must be one of causal, masked, encoder"),
        ("model.yaml", _edit("kind: causal", "sort: causal"), "model.yaml has no kind"),
        ("model.yaml", _edit("vocab_size: 300", "vocab_size: none"), "vocab_size must be"),
        ("model.yaml", _edit("mlp: 64", "mlp: 65"), r"must have shape \(2, 65, 32\), got \(2, 64, 32\)"),
        ("model.yaml", _edit("tied: true", "tied: false"), "has no weights for head/decoder/kernel"),
        ("model.yaml", _edit("layers: 2", "layers: 0"), "layers must be at least 1"),
        ("model.yaml", _edit("vocab_size: 300", "vocab_size: 299"), "300 tokens, and the model 299 rows"),
        ("tokenizer.json", Path.unlink, "no such tokenizer file"),
        ("tokenizer.json", lambda p: p.write_text("{}", encoding="utf-8"), "not a tokenizer.json"),
        ("origin.json", lambda p: p.write_text("{", encoding="utf-8"), "origin.json is damaged"),
    ],
)
def test_a_damaged_directory_is_one_message(
    saved: Path, tmp_path: Path, file: str, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved, tmp_path / "model")
    damage(tmp_path / "model" / file)
    with pytest.raises(UserError, match=message):
        cramjax.load(tmp_path / "model")
    assert main(["generate", str(tmp_path / "model")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_weights_left_over_are_named(model_of: MakeModel, tmp_path: Path) -> None:
    model_of(tied=False).save(tmp_path / "model")
    _edit("tied: false", "tied: true")(tmp_path / "model/model.yaml")
    with pytest.raises(UserError, match="no place for: head/decoder/kernel"):
        cramjax.load(tmp_path / "model")


def test_an_output_that_exists_and_a_full_disk(
    model_of: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cramjax.language_model import directory

    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="exists already: give another path to --out"):
        model_of().save(tmp_path / "model")
    written = directory.write_safetensors

    def full(path: Path, outputs: Any) -> None:
        written(path, outputs[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directory, "write_safetensors", full)
    with pytest.raises(UserError, match="no space is left on the device"):
        model_of().save(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_generate_and_fill_masks_with_a_model_or_its_path(model_of: MakeModel, tmp_path: Path) -> None:
    causal, masked = model_of(), model_of("masked")
    causal.save(tmp_path / "causal")
    masked.save(tmp_path / "masked")
    wanted = generate(causal, "the stack", max_tokens=9, temperature=0.0)
    assert generate(tmp_path / "causal", "the stack", max_tokens=9, temperature=0.0) == wanted
    assert cramjax.generate(str(tmp_path / "causal"), "the stack", max_tokens=9, temperature=0.0) == wanted[0]
    assert fill_mask(tmp_path / "masked", "the [MASK]") == fill_mask(masked, "the [MASK]")
    encoder = dataclasses.replace(masked, kind="encoder")
    for use in (
        lambda: generate(encoder, "the"),
        lambda: fill_mask(encoder, "[MASK]"),
        lambda: cramjax.evaluate(encoder),
    ):
        with pytest.raises(RunError, match="encoder without a head"):
            use()


def test_a_begin_and_several_ends(model_of: MakeModel) -> None:
    """Another's tokenizer: nothing or its own token stands before a prompt, and any of its ends stops the text."""
    given = model_of(head_bias=True)
    words = given.tokenizer
    assert words.opening([5]) == [words.separator_id] and words.ends == (words.separator_id,)
    other = dataclasses.replace(words, begin_ids=(), end_ids=(77,))
    assert other.opening([5]) == [] and other.opening() == [words.separator_id]
    given.params["head"]["decoder"] = {"bias": jnp.zeros(given.model.sizes.vocab).at[77].set(100.0)}
    stopped = generate(dataclasses.replace(given, tokenizer=other), "the", max_tokens=9)[0]
    assert (stopped.stopped, stopped.tokens, stopped.text) == ("separator", 1, "")
    assert generate(given, "the", max_tokens=9)[0].stopped == "length"


def test_a_window_that_slides_begins_with_the_begin_token(model_of: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given = model_of()
    begin = 7
    tokenizer = dataclasses.replace(given.tokenizer, begin_ids=(begin,))
    given = dataclasses.replace(given, tokenizer=tokenizer, context=16)
    seen: list[tuple[int, ...]] = []
    add = Engine.add

    def watched(engine: Engine, request: Any, tell: Any) -> int:
        seen.append(request.prompt)
        return add(engine, request, tell)

    monkeypatch.setattr(Engine, "add", watched)
    generate(given, "the", max_tokens=30, temperature=0.0)
    assert len(seen) > 2 and all(prompt[0] == begin for prompt in seen)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_evaluate_needs_text_and_scores_it(model_of: MakeModel, tmp_path: Path, kind: str) -> None:
    given = model_of(kind)
    given.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the stack walks block by block. " * 20, encoding="utf-8")
    with pytest.raises(RunError, match="no held-out text of its own: give files"):
        cramjax.evaluate(tmp_path / "model")
    score = cramjax.evaluate(tmp_path / "model", tmp_path / "text.txt")
    assert score == cramjax.evaluate(given, tmp_path / "text.txt")
    if kind == "masked":
        return
    ids = np.array(
        [[given.tokenizer.separator_id, *given.tokenizer.encode((tmp_path / "text.txt").read_text(encoding="utf-8"))]]
    )
    logits = []
    for start in range(0, ids.shape[1], 32):  # the context
        hidden = given.model.hidden(given.params, jnp.asarray(ids[:, start : start + 32], jnp.int32))
        logits.append(np.asarray(given.model.logits(given.params, hidden)[0], np.float64))
    log_p = np.concatenate(logits) - np.log(np.exp(np.concatenate(logits)).sum(-1, keepdims=True))
    targets = [*ids[0, 1:], given.tokenizer.separator_id]
    np.testing.assert_allclose(score.loss, -np.mean(log_p[np.arange(len(targets)), targets]), rtol=1e-5)


def test_the_commands(model_of: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_of(norm="rmsnorm", activation="swiglu").save(tmp_path / "model")
    model, out = str(tmp_path / "model"), str(tmp_path / "llama")
    assert main(["export", model, "--out", out]) == 0
    assert main(["export", model, "--out", out]) == 2
    assert main(["import", out, "--out", str(tmp_path / "again"), "--dtype", "bfloat16"]) == 0
    assert main(["import", out, "--out", str(tmp_path / "again")]) == 2
    assert main(["import", model, "--out", str(tmp_path / "twice")]) == 2
    assert main(["import", str(tmp_path / "nothing"), "--out", str(tmp_path / "twice")]) == 2
    assert main(["plan", model, "--device", "rtx4090", "--batch.size=8", "--budget=10steps"]) == 0
    assert main(["plan", model, "--device", "rtx4090", "--batch.sise=8"]) == 2
    captured = capsys.readouterr()
    assert "llama, 26,272 parameters, causal" in captured.out or "llama" in captured.out
    assert [line.split(": ")[0] for line in captured.err.splitlines()] == ["error"] * 5
    assert not (tmp_path / "twice").exists()


def test_the_model_of_a_run(tmp_path: Path) -> None:
    """A run's model directory generates and scores as the run does."""
    from cramjax.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TokenizerConfig
    from cramjax.data.tokenizer import train_tokenizer
    from cramjax.training import Run
    from cramjax.training.parts import build_model

    words = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), ["the stack walks block by block. " * 20])
    config = dataclasses.replace(
        RunConfig(),
        data=DataConfig(sequence_length=16, normalize="ascii_lower"),
        model=ModelConfig(layers=2, width=32, heads=2, mlp=64, init_std=0.3),
        objective=ObjectiveConfig(kind="masked", mask_rate=0.3),
    )
    built = build_model(config, words, "float32")
    run = Run(Path("some-run"), config, words, built, built.init(jax.random.key(0)), {"bits_per_byte": 2.5})
    run.language_model.save(tmp_path / "model")
    loaded = cramjax.load(tmp_path / "model")
    assert isinstance(loaded, LanguageModel)
    assert (loaded.kind, loaded.context, loaded.normalize, loaded.mask_rate) == ("masked", 16, "ascii_lower", 0.3)
    assert loaded.origin["summary"] == {"bits_per_byte": 2.5}
    assert fill_mask(run, "the [MASK]") == fill_mask(loaded, "the [MASK]")
    (tmp_path / "text.txt").write_text("The stack walks block by block. " * 20, encoding="utf-8")
    ours, theirs = cramjax.evaluate(run, tmp_path / "text.txt"), cramjax.evaluate(loaded, tmp_path / "text.txt")
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-6)
