"""Every kind of compressed matrix in every use: read again, evaluated, generated and served from, tuned, and exported;
against the same model with the numbers that its matrices stand for.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax import import_model
from cramjax.adapters import AdapterConfig
from cramjax.compress.grid import find_ternary_grid
from cramjax.evaluation import evaluate_text
from cramjax.kernels.packed import LowRank, is_packed, quantise, stack_coded, unpacked
from cramjax.language_model import LanguageModel, load_model
from cramjax.model import make_model
from cramjax.serve import generate
from cramjax.serve.decoding import for_decoding
from cramjax.serve.engine import Engine
from cramjax.serve.request import Request, SamplingParameters
from cramjax.serving import EngineConfig
from cramjax.training.continuing import starting_params

MakeModel = Callable[..., LanguageModel]
PROMPTS = ((5, 6, 7), (9, 8, 7, 6))


def sparse(w: Any) -> Any:
    """Of every 4 inputs the 2 largest weights."""
    parts = w.reshape(*w.shape[:-2], -1, 4, w.shape[-1])
    ranks = jnp.argsort(jnp.argsort(-jnp.abs(parts), axis=-2), axis=-2)
    return jnp.where(ranks < 2, parts, 0).reshape(w.shape)


KINDS: dict[str, Callable[[Any], Any]] = {
    "int8": lambda w: quantise(w, 8, 16, scale_dtype="bfloat16"),
    "int4, zeros": lambda w: quantise(w, 4, 16, symmetric=False, scale_dtype="bfloat16"),
    "int3": lambda w: quantise(w, 3, 16),
    "ternary": lambda w: stack_coded([find_ternary_grid(own, means=True).leaf(own) for own in w]),
    "sparse int4": lambda w: quantise(sparse(w), 4, 16),
}


@pytest.fixture(scope="module")
def plain(model_of: MakeModel) -> LanguageModel:
    """Of Llama's class, and of two layers."""
    return model_of(layers=2, norm="rmsnorm", tied=False)


def with_numbers(model: LanguageModel) -> LanguageModel:
    params = jax.tree.map(lambda leaf: jnp.asarray(unpacked(leaf)), model.params, is_leaf=is_packed)
    return replace(model, params=params)


def served(model: LanguageModel) -> list[list[int]]:
    """The likeliest tokens after some prompts, asked for at once."""
    engine = Engine(for_decoding(model), EngineConfig(slots=2, page=4, cache_tokens=64))
    got: list[list[int]] = [[] for _ in PROMPTS]
    for prompt, own in zip(PROMPTS, got, strict=True):
        request = Request(prompt, 6, SamplingParameters(temperature=0.0))
        engine.add(request, lambda progress, own=own: own.extend(progress.tokens))
    while engine.step():
        pass
    return got


@pytest.fixture(scope="module")
def hidden(plain: LanguageModel) -> Callable[[LanguageModel], np.ndarray]:
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 290, (2, 24)), jnp.int32)
    compiled = jax.jit(plain.model.hidden)
    return lambda model: np.asarray(compiled(model.params, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_use(
    plain: LanguageModel, hidden: Callable[[LanguageModel], np.ndarray], held_out: str, tmp_path: Path, kind: str
) -> None:
    params = jax.tree.map(
        lambda weight, leaf: KINDS[kind](leaf) if weight.role == "matrix" else leaf, plain.model.weights, plain.params
    )
    made = replace(plain, params=params)
    made.save(tmp_path / "model")
    read, numbers = load_model(tmp_path / "model"), with_numbers(made)
    for ours, again in zip(*(jax.tree.leaves(m.params, is_leaf=is_packed) for m in (made, read)), strict=True):
        assert type(ours) is type(again) or not is_packed(ours)
        np.testing.assert_array_equal(unpacked(ours), unpacked(again))
    expected = hidden(numbers)
    np.testing.assert_allclose(hidden(read), expected, atol=2e-5)
    scores = [evaluate_text(model, held_out).bits_per_byte for model in (read, numbers)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    texts = [generate(model, "the", max_tokens=6, temperature=0.0)[0].text for model in (read, numbers)]
    assert texts[0] == texts[1]
    answers = [served(model) for model in (read, numbers)]
    assert answers[0] == answers[1] and all(len(answer) == 6 for answer in answers[0])

    adapter = AdapterConfig(kind="lora", rank=2, base="float32")
    model = plain.model
    tuned = make_model(
        plain.config,
        vocab_size=model.vocab_size,
        sequence_length=model.sequence_length,
        causal=True,
        separator_id=plain.tokenizer.separator_id,
        adapter=adapter,
    )
    start = starting_params(tmp_path / "model", tuned)
    up = start["blocks"]["mlp"]["up"]["kernel"]
    assert isinstance(up, LowRank)
    np.testing.assert_array_equal(up.base, unpacked(read.params["blocks"]["mlp"]["up"]["kernel"]))
    slopes = jax.grad(lambda b: jnp.sum(jnp.square(replace(up[0], b=b).multiply(jnp.ones((3, 32)), jnp.float32))))(
        up[0].b
    )
    assert bool(jnp.any(slopes != 0))

    made.export(tmp_path / "hf", dequantise=True)
    np.testing.assert_allclose(hidden(_padded(import_model(tmp_path / "hf"), plain)), expected, atol=2e-5)


def _padded(model: LanguageModel, like: LanguageModel) -> LanguageModel:
    """With as many rows of the vocabulary as another has."""
    params = jax.tree.map(
        lambda leaf, other: jnp.pad(leaf, [(0, b - a) for a, b in zip(leaf.shape, other.shape, strict=True)]),
        model.params,
        like.params,
    )
    return replace(model, params=params)
