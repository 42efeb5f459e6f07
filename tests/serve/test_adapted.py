"""A model with two adapters beside it: each answers as the model that it is merged into."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from starlette.testclient import TestClient

from cramjax.errors import ConfigError, ModelError
from cramjax.formats.peft import write_adapter
from cramjax.formats.table import flatten, unflatten
from cramjax.kernels.packed import LowRank, merge
from cramjax.language_model import LanguageModel
from cramjax.serve.adapted import AdaptedEngine, with_adapters
from cramjax.serve.decoding import for_decoding
from cramjax.serve.engine import Engine
from cramjax.serve.http.app import make_app, make_service
from cramjax.serve.request import Progress, Request, SamplingParameters
from cramjax.server import ServeConfig
from cramjax.serving import EngineConfig

pytestmark = pytest.mark.slow

CONFIG = EngineConfig(slots=2, deterministic=True)
LLAMA: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rotary"}
PROMPTS = [(5, 6, 7), (5, 6, 7, 8, 9, 10, 11, 12, 13)]


@pytest.fixture(scope="module")
def model(run_of: Callable[..., Any]) -> LanguageModel:
    made = run_of(sequence_length=64, **LLAMA).language_model
    # Sums of a product and of its adapter's round otherwise than products of their sum, visibly so in bfloat16.
    return replace(made, model=replace(made.model, compute_dtype="float32"))


def beside(model: LanguageModel, seed: int, rank: int) -> LanguageModel:
    """The model with a random adapter of a rank on two of its kinds of matrices."""
    leaves = dict(flatten(model.params))
    draw = np.random.default_rng(seed)
    for path, leaf in leaves.items():
        if path in ("blocks/attention/out/kernel", "blocks/mlp/down/kernel"):
            *layers, inner, outer = leaf.shape
            a, b = draw.normal(0, 0.3, (*layers, inner, rank)), draw.normal(0, 0.3, (*layers, rank, outer))
            leaves[path] = LowRank(leaf, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), scale=2.0)
    return replace(model, params=unflatten(leaves, model.params))


@pytest.fixture(scope="module")
def adapted(model: LanguageModel) -> dict[str, LanguageModel]:
    return {"loud": beside(model, 1, rank=2), "quiet": beside(model, 2, rank=3)}


@pytest.fixture(scope="module")
def directories(
    adapted: dict[str, LanguageModel], model: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(path / name, own.params, model) for name, own in adapted.items()}


@pytest.fixture(scope="module")
def engine(model: LanguageModel, directories: dict[str, Path]) -> AdaptedEngine:
    return AdaptedEngine(model, with_adapters(model, directories), CONFIG)


def answers(engine: Any, requests: Sequence[Request]) -> list[list[int]]:
    got: list[list[Progress]] = [[] for _ in requests]
    for request, own in zip(requests, got, strict=True):
        engine.add(request, own.append)
    while engine.step():
        pass
    assert all(own[-1].reason == "length" for own in got)
    return [[token for each in own for token in each.tokens] for own in got]


def test_each_answers_as_the_model_that_it_is_merged_into(
    model: LanguageModel, adapted: dict[str, LanguageModel], engine: AdaptedEngine
):
    greedy = SamplingParameters(temperature=0.0)
    names = [None, "loud", "quiet"]
    asked = [Request(prompt, 8, greedy, adapter=name) for prompt in PROMPTS for name in names] * 2
    found = answers(engine, asked)
    load = engine.load()
    assert load.running == load.waiting == load.pages_used == load.compilations == 0 and load.drawn_tokens == 96
    expected: dict[Any, list[list[int]]] = {}
    for name in names:
        params = model.params if name is None else merge(adapted[name].params).params
        plain = Engine(replace(model, params=params), CONFIG)
        expected[name] = answers(plain, [Request(prompt, 8, greedy) for prompt in PROMPTS])
    assert found == [expected[name][place] for place in (0, 1) for name in names] * 2
    assert len({tuple(expected[name][0]) for name in names}) == 3, "they differ"


def test_one_that_is_cancelled_ends(engine: AdaptedEngine):
    got: list[Progress] = []
    number = engine.add(Request((5, 6), 20, adapter="loud"), got.append)
    engine.step()
    engine.cancel(number)
    engine.cancel(number)
    assert got[-1].reason == "cancelled" and not engine.step() and not engine._numbers
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        engine.add(Request((5, 6), 20, adapter="other"), got.append)


def test_clients_ask_for_them_by_name(model: LanguageModel, engine: AdaptedEngine):
    config = ServeConfig(name="base", engine=CONFIG)
    with pytest.raises(ConfigError, match="the model is called loud too"):
        make_service(model, engine, replace(config, name="loud"), ("loud", "quiet"))
    with TestClient(make_app(make_service(model, engine, config, ("loud", "quiet")))) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [
            ("base", None),
            ("loud", "base"),
            ("quiet", "base"),
        ]
        assert client.get("/v1/models/quiet").json() == cards[2]
        texts = set()
        for name in ("base", "loud", "quiet"):
            body = {"model": name, "prompt": "the stack", "max_tokens": 8, "temperature": 0}
            answer = client.post("/v1/completions", json=body).json()
            assert answer["model"] == name
            texts.add(answer["choices"][0]["text"])
        assert len(texts) == 3
        assert client.post("/v1/completions", json={"model": "other", "prompt": "the"}).status_code == 404


def test_one_of_another_model_is_refused(run_of: Callable[..., Any], directories: dict[str, Path], tmp_path: Path):
    other = replace(run_of(sequence_length=64, **LLAMA).language_model)
    wider = run_of(sequence_length=64, seed=1, **LLAMA, **{"kv_heads": 1}).language_model
    with_adapters(other, directories)  # of the same shapes: nobody can tell
    wide = beside(wider, 1, rank=2)
    bad = write_adapter(tmp_path / "bad", wide.params, wider)
    for file in bad.iterdir():
        if file.name.endswith(".json"):
            file.write_text(file.read_text(encoding="utf-8").replace('"r": 2', '"r": 5'), encoding="utf-8")
    for directory in (bad, tmp_path / "nowhere"):
        with pytest.raises(ModelError, match="the adapter x cannot be served beside"):
            with_adapters(other, {"x": directory})


def test_they_lie_beside_weights_as_these_are_held(model: LanguageModel, directories: dict[str, Path]):
    held = for_decoding(model, "bfloat16")
    made = with_adapters(held, directories)
    own = {id(leaf) for leaf in jax.tree.leaves(held.params)}
    assert sum(id(leaf) not in own for leaf in jax.tree.leaves(made["loud"].params)) <= 8, "only a and b are new"
    asked = [Request(PROMPTS[1], 6, SamplingParameters(temperature=0.0))]
    plain, loud = (answers(Engine(own, CONFIG), asked) for own in (held, made["loud"]))
    assert plain != loud
