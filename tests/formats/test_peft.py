"""Adapters in peft's files: the same logits here and there, both ways, and files that cannot be read as one message."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ModelError
from cramjax.formats.peft import CONFIG, WEIGHTS, read_adapter, write_adapter
from cramjax.formats.tensors import open_safetensors, whole, write_safetensors
from cramjax.kernels.packed import is_packed, low_rank, merge, scaled
from cramjax.language_model import LanguageModel, load_model, save_model
from cramjax.recipes import load_recipe
from cramjax.training import train

from .models import seeded as theirs
from .models import tokens

peft = pytest.importorskip("peft", reason="needs the `parity` extra: pip install -e '.[parity]'")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers

LLAMA = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=12),
    "rslora": lambda: peft.LoraConfig(r=5, lora_alpha=6, use_rslora=True, target_modules="all-linear"),
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules="all-linear"),
    "ia3": lambda: peft.IA3Config(),
}


def random_adapter(kind: str, config: Any) -> Any:
    """A model of theirs with an adapter of which every part matters."""
    model = peft.get_peft_model(theirs(kind), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                drawn = 0.15 * torch.randn(parameter.shape, generator=generator)
                is_factor = "ia3" in name or "magnitude" in name
                parameter.copy_(parameter * (1 + drawn) if is_factor else drawn)
    return model.eval()


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        out = model(torch.from_numpy(tokens()))
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


def our_logits(given: LanguageModel, params: Any) -> np.ndarray:
    @jax.jit
    def run(params: Any) -> jax.Array:
        hidden = given.model.hidden(params, jnp.asarray(tokens(), jnp.int32))
        return hidden if given.kind == "encoder" else given.model.logits(params, hidden)

    return np.asarray(run(params))


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def adapters(params: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(params, is_leaf=is_packed) if is_packed(leaf)]


def loaded(kind: str, path: Path) -> Any:
    """Their model with an adapter of ours, none of whose tensors is missing or left over."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(theirs(kind), path).eval()
    assert not [str(one.message) for one in said if "keys" in str(one.message)]
    return model


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_adapters_of_peft_are_read_and_written_back(
    kind: str, method: str, imported: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    their = random_adapter(kind, ADAPTERS[method]())
    their.save_pretrained(tmp_path / "theirs")
    given, wanted = imported(kind), their_logits(their)
    params = read_adapter(tmp_path / "theirs", given)
    assert np.abs(our_logits(given, given.params) - wanted).max() > 0.1  # without, they are others
    assert_close(our_logits(given, params), wanted)
    assert_close(our_logits(given, merge(params).params), wanted)
    write_adapter(tmp_path / "ours", params, given)
    assert_close(their_logits(loaded(kind, tmp_path / "ours")), wanted)
    stored, again = (open_safetensors([tmp_path / name / WEIGHTS]) for name in ("theirs", "ours"))
    assert set(stored.names) == set(again.names)
    for name in stored.names:
        np.testing.assert_array_equal(stored.read(name), again.read(name), err_msg=name)
    configs = [json.loads((tmp_path / name / CONFIG).read_text(encoding="utf-8")) for name in ("theirs", "ours")]
    same = {"r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "peft_type"} & configs[0].keys()
    assert {key: configs[0][key] for key in same} == {key: configs[1][key] for key in same}
    assert max(map(len, configs[1]["target_modules"])) < 30  # short names, not one for each layer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"target_modules": LLAMA, "rank_pattern": {"down_proj": 5}, "alpha_pattern": {"mlp.down_proj": 9}}),
        ("llama", {"r": 2, "target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [1]}),
        ("nanochat", {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "lm_head"], "use_dora": True}),
        ("modernbert", {"r": 2, "target_modules": ["Wqkv", "mlp.Wo", "dense"]}),
        ("roberta", {"r": 2, "target_modules": ["query", "output.dense"]}),
        ("qwen2", {"r": 2, "target_modules": ["o_proj", "up_proj"], "use_dora": True}),
    ],
)  # fmt: skip
def test_other_targets(
    kind: str, config: dict[str, Any], imported: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    """Ranks by pattern, some layers, rows that are swapped, a head of 130 columns of padded 256, and blocks in turn."""
    their = random_adapter(kind, peft.LoraConfig(**config))
    their.save_pretrained(tmp_path / "theirs")
    given, wanted = imported(kind), their_logits(their)
    params = read_adapter(tmp_path / "theirs", given)
    assert_close(our_logits(given, params), wanted)
    write_adapter(tmp_path / "ours", params, given)
    assert_close(their_logits(loaded(kind, tmp_path / "ours")), wanted)
    stored, again = (open_safetensors([tmp_path / name / WEIGHTS]).names for name in ("theirs", "ours"))
    assert {name for name in stored if "base_layer" not in name} == set(again)  # peft copies a head into the file


def test_an_encoder_without_a_head(imported: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    """Names in files of the whole model start otherwise than in those of the encoder: both are read."""
    given = imported("bert-encoder")
    whole_model = random_adapter("bert", peft.LoraConfig(r=2))
    encoder = whole_model.get_base_model().bert
    with torch.no_grad():
        wanted = encoder(torch.from_numpy(tokens())).last_hidden_state.numpy()
    whole_model.save_pretrained(tmp_path / "theirs")
    params = read_adapter(tmp_path / "theirs", given)
    assert_close(our_logits(given, params), wanted)
    write_adapter(tmp_path / "ours", params, given)
    again = peft.PeftModel.from_pretrained(theirs("bert").bert, tmp_path / "ours").eval()
    assert_close(their_logits(again), wanted)


def drawn(leaf: Any) -> Any:
    """An adapter whose trained parts are random."""
    keys = iter(jax.random.split(jax.random.key(3), 9))
    parts = {name: part for name in leaf.trained if (part := getattr(leaf, name)) is not None}
    return replace(leaf, **{name: 0.3 + 0.3 * jax.random.normal(next(keys), x.shape) for name, x in parts.items()})


def with_adapter(given: LanguageModel, path: str, make: Callable[[Any], Any]) -> Any:
    """Parameters with one adapter, at the path of a matrix; all parts of it are random."""
    *above, last = path.split("/")
    params = jax.tree.map(lambda leaf: leaf, given.params)
    place = params
    for key in above:
        place = place[key]
    place[last] = drawn(make(place[last]))
    return params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "path", "widths"),
    [
        ("gpt2", "blocks/attention/qkv/kernel", (48, 48, 48)),  # one of theirs, whose rank is the sum
        ("gpt2", "blocks/mlp/down/kernel", ()),
        ("llama", "blocks/attention/qkv/kernel", (48, 24, 24)),
        ("llama", "blocks/attention/qkv/kernel", ()),  # three of theirs with one a
        ("llama", "blocks/mlp/up/kernel", (64, 64)),
    ],
)
def test_adapters_of_ours_load_in_peft(
    kind: str, path: str, widths: tuple[int, ...], imported: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    given = imported(kind)
    for dora in (False, True):
        params = with_adapter(
            given, path, lambda w, dora=dora: low_rank(w, 2, scale=0.7, key=jax.random.key(0), widths=widths, dora=dora)
        )
        written = write_adapter(tmp_path / f"{dora}", params, given)
        assert_close(their_logits(loaded(kind, written)), our_logits(given, params))
        assert_close(our_logits(given, read_adapter(written, given)), our_logits(given, params))


@pytest.mark.parametrize(
    ("kind", "path", "options"),
    [
        ("gpt2", "blocks/attention/qkv/kernel", {"start": 48}),
        ("llama", "blocks/attention/qkv/kernel", {"start": 48}),
        ("llama", "blocks/mlp/up/kernel", {"inputs": True}),
        ("bert", "blocks/mlp/down/kernel", {"inputs": True}),  # `output.dense` would be attention's too
    ],
)
def test_factors_of_ours_load_in_peft(
    kind: str, path: str, options: Any, imported: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    given = imported(kind)
    params = with_adapter(given, path, lambda w: scaled(w, **options))
    written = write_adapter(tmp_path / "ours", params, given)
    assert_close(their_logits(loaded(kind, written)), our_logits(given, params))
    assert_close(our_logits(given, read_adapter(written, given)), our_logits(given, params))


@pytest.fixture
def adapter(imported: Callable[[str], LanguageModel], tmp_path: Path) -> Path:
    """An adapter of a tiny Llama."""
    random_adapter("llama", peft.LoraConfig(r=2, target_modules=LLAMA)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewritten(path: Path, change: dict[str, Any]) -> None:
    """The files of an adapter with options or tensors changed; a tensor that is None is left out."""
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    stored = open_safetensors([path / WEIGHTS])
    tensors = {name: stored.read(name) for name in stored.names}
    for key, value in change.items():
        if key.startswith("base_model.model."):
            tensors[key] = value
        else:
            config[key] = value
    (path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    outputs = [whole(name, x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items() if x is not None]
    write_safetensors(path / WEIGHTS, outputs)


_Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "of peft_type 'LOHA': adapters of type LORA, IA3, PROMPT_TUNING"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\], which has no counterpart"),
        ({"bias": "all"}, "bias='all', which has no counterpart"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": 3}, r"must have shape \(3, 48\) .* got \(2, 48\): the adapter is of another model, or its config"),
        ({"r": None}, r"gives no rank and alpha for .*q_proj \(r=None"),
        ({"alpha_pattern": {"q_proj": 3}}, "q_proj has an adapter of rank 2 and scale 1.5, and .* v_proj|v_proj of 2"),
        ({f"{_Q}.lora_A.weight": np.zeros((2, 40), np.float32)}, r"got \(2, 40\): the adapter is of another model"),
        ({f"{_Q}.lora_A.weight": np.zeros(0, np.float32)}, r"q_proj.lora_A.weight is empty, .* ZeRO-3"),
        ({f"{_Q}.lora_A.weight": np.zeros((2, 48), np.int8)}, "is stored as int8"),
        ({f"{_Q}.lora_B.weight": None}, "q_proj has lora_A.weight in the adapter, and needs lora_A.weight, lora_B"),
        ({"use_dora": True}, "and needs lora_A.weight, lora_B.weight, lora_magnitude_vector"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros(2)}, "adapters of embeddings are not here"),
        ({"base_model.model.model.layers.9.mlp.down_proj.lora_A.weight": np.zeros(2)}, "no such linear layer"),
        ({"base_model.model.score.weight": np.zeros(2)}, "no such linear layer"),
        ({f"{_Q}.base_layer.weight": np.zeros((48, 48), np.float32)}, "q_proj of its own .* not the model.s"),
        ({"peft_type": "IA3"}, "q_proj has lora_A.weight, lora_B.weight in an adapter of type IA3"),
        (
            {"peft_type": "IA3", "feedforward_modules": "(q_proj"},
            r"feedforward_modules='\(q_proj', which is no regular",
        ),
    ],
)
def test_what_cannot_be_read_is_said(
    change: dict[str, Any], words: str, adapter: Path, imported: Callable[[str], LanguageModel]
) -> None:
    rewritten(adapter, change)
    with pytest.raises(ModelError, match=words):
        read_adapter(adapter, imported("llama"))


def test_files_that_are_none_are_said(adapter: Path, imported: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    given = imported("llama")
    with pytest.raises(ModelError, match="no such linear layer"):
        read_adapter(adapter, imported("gpt2"))
    adapted = replace(given, params=read_adapter(adapter, given))
    with pytest.raises(ModelError, match="has an adapter already"):
        read_adapter(adapter, adapted)
    shutil.copytree(adapter, tmp_path / "other")
    (tmp_path / "other" / WEIGHTS).rename(tmp_path / "other/adapter_model.bin")
    with pytest.raises(ModelError, match="adapter_model.bin alone, a pickle"):
        read_adapter(tmp_path / "other", given)
    (adapter / CONFIG).write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="is damaged"):
        read_adapter(adapter, given)
    with pytest.raises(ModelError, match="has no adapter_config.json"):
        read_adapter(tmp_path, given)


def test_the_base_is_named_and_another_one_is_said(
    imported: Callable[[str], LanguageModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = jax.random.key(0)
    given = imported("llama")
    params = with_adapter(given, "blocks/mlp/down/kernel", lambda w: low_rank(w, 2, scale=1.0, key=key))
    tuned = replace(given, origin={"family": "llama", "base": "hub:someone/small-llama"})
    written = write_adapter(tmp_path / "adapter", params, tuned)
    assert (
        json.loads((written / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"] == "someone/small-llama"
    )
    for same in ({"imported_from": "hub:someone/small-llama"}, {"imported_from": "/models/small-llama"}):
        read_adapter(written, replace(given, origin={"family": "llama", **same}))
    assert not caplog.records
    read_adapter(written, replace(given, origin={"family": "llama", "imported_from": "hub:someone/other"}))
    assert "names someone/small-llama as the base of the adapter, and the model given is someone/other" in caplog.text
    # Merged, it is no longer what it was imported from.
    caplog.clear()
    merged = {"family": "llama", "imported_from": "hub:someone/small-llama", "merged": "adapter"}
    read_adapter(written, replace(given, path=Path("/models/merged"), origin=merged))
    assert "and the model given is /models/merged" in caplog.text


def test_what_cannot_be_written_is_said(imported: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    given = imported("llama")
    path, key = "blocks/mlp/down/kernel", jax.random.key(0)
    both = with_adapter(given, path, lambda w: low_rank(w, 2, scale=1.0, key=key))
    two = with_adapter(given, path, lambda w: low_rank(w, 2, scale=1.0, key=key, dora=True))
    for params in (both, two):
        params["blocks"]["attention"] = with_adapter(
            given,
            "blocks/attention/out/kernel",
            (lambda w: scaled(w, inputs=True)) if params is both else lambda w: low_rank(w, 2, scale=1.0, key=key),
        )["blocks"]["attention"]
    for params, words in (
        (given.params, "no adapters to be written"),
        (both, "and this model has several"),
        (two, "of all matrices or of none"),
        (with_adapter(given, path, lambda w: scaled(w, inputs=True, start=0)), "peft has one of the two"),
    ):
        with pytest.raises(ModelError, match=words):
            write_adapter(tmp_path / "out", params, given)
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_class_computes_has_no_adapters_to_write(model_of: Any, tmp_path: Path) -> None:
    given = model_of(activation="relu2", embedding_skip=True)
    params = with_adapter(given, "blocks/mlp/down/kernel", lambda w: low_rank(w, 2, scale=1.0, key=jax.random.key(0)))
    with pytest.raises(ModelError, match="no class of transformers computes this model"):
        write_adapter(tmp_path / "out", params, given)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_what_a_run_has_trained_goes_out(
    imported: Callable[[str], LanguageModel], cache_directory: Path, tmp_path: Path, base: str
) -> None:
    """From a model directory to peft's files, as a user goes; the base of few bits is theirs in float32."""
    save_model(imported("llama"), tmp_path / "base")
    rows = [{"prompt": f"w{n} w{n + 1}", "completion": f" w{n + 2}"} for n in range(5, 60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {"model.from": str(tmp_path / "base"), "examples.source": str(tmp_path / "rows.jsonl")}
    given |= {"examples.format": "completion", "budget": "3steps", "data.sequence_length": 24, "optim.lr": 0.05}
    given |= {"adapter.base": base, "adapter.rank": 2, "train.data_parallel": 1, "train.compute_dtype": "float32"}
    run = train(load_recipe("tune-chat", given), tmp_path / "run")
    run.language_model.export(tmp_path / "out", "peft")
    wanted = their_logits(loaded("llama", tmp_path / "out"))
    unchanged = their_logits(theirs("llama"))
    assert np.abs(wanted - unchanged).max() > 1e-3 * np.abs(wanted).max()
    if base == "float32":
        assert_close(our_logits(run.language_model, run.language_model.params), wanted)
    again = read_adapter(tmp_path / "out", load_model(tmp_path / "base"))
    assert_close(our_logits(load_model(tmp_path / "base"), again), wanted)
