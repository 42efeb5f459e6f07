"""AWQ's scales: the model computes the same before it is rounded, and less is lost then."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.compress import compress_model
from cramjax.compress.awq import best_scale, clipped, scaled_block
from cramjax.compress.matrix import rewrite, rounded_to_nearest
from cramjax.compress.walk import BlockWalk
from cramjax.compression import CompressConfig, resolved
from cramjax.config import LayerConfig
from cramjax.errors import ConfigError, ModelError
from cramjax.language_model import LanguageModel, load_model

from . import plain

MakeModel = Callable[..., LanguageModel]
TOKENS = np.random.default_rng(0).integers(3, 290, (4, 16)).astype(np.int32)
CONFIG = resolved(CompressConfig(method="rtn", data="text", bits=3, group=16, awq=True))
MODELS: dict[str, dict[str, Any]] = {
    "layernorm": {"norm": "layernorm", "bias": True},
    "grouped": {"norm": "rmsnorm", "kv_heads": 1, "qk_norm": True},
    "relu": {"activation": "relu2", "bias": True},
    "pattern": {"layers": 4, "pattern": (LayerConfig(attention_norm=False), LayerConfig(window=8))},
    "gelu": {"activation": "gelu_tanh", "embedding_skip": True},
}


def with_outliers(model: LanguageModel) -> LanguageModel:
    """Norms that make some inputs thirty times as large."""
    for place in (model.params["blocks"], *(model.params["blocks"].get(str(i), {}) for i in range(2))):
        for norm in ("attention_norm", "mlp_norm"):
            if norm in place:
                place[norm]["weight"] = place[norm]["weight"].at[..., ::9].multiply(30.0)
    return model


def scaled(model: LanguageModel, walk: BlockWalk) -> tuple[Any, list[dict[str, Any]]]:
    """The parameters with scales in them, and what changed beside matrices."""
    calibration = walk.begin(model.params, TOKENS, 2)
    blocks, changes = [], []
    for repeat in range(model.model.repeats):
        block = jax.tree.map(lambda leaf, repeat=repeat: np.asarray(leaf[repeat]), model.params["blocks"])
        made, changed = scaled_block(walk, block, repeat, calibration, lambda w: rounded_to_nearest(w, CONFIG))
        _, after = walk.visit(block, repeat, calibration, lambda name, w, hessian: (w, w))
        assert after is not None
        calibration = after
        blocks.append(made)
        changes.append(changed)
    return {**model.params, "blocks": jax.tree.map(lambda *parts: jnp.stack(parts), *blocks)}, changes


@pytest.mark.parametrize(
    "kind", ["layernorm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(MODELS)[1:])]
)
def test_the_model_computes_the_same(model_of: MakeModel, kind: str) -> None:
    model = with_outliers(model_of(**{"layers": 2, **MODELS[kind]}))
    params, changes = scaled(model, BlockWalk(model.model, jax.devices()[0]))
    run = jax.jit(lambda params: model.model.logits(params, model.model.hidden(params, jnp.asarray(TOKENS))))
    wanted = np.asarray(run(model.params))
    np.testing.assert_allclose(run(params), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    names = {name for changed in changes for name in changed}
    assert any(name.endswith("mlp_norm/weight") for name in names)
    assert kind != "layernorm" or {"mlp_norm/bias", "attention/qkv/bias", "mlp/up/bias"} < names
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, new), old in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(model.params), strict=True
        )
        if np.abs(np.asarray(new) / np.asarray(old) - 1).max() > 0.05
    }
    # Values are scaled where there are as many heads of them as of queries, and what is let through by a gate.
    assert ("blocks/attention/out/kernel" in moved) == (kind in ("layernorm", "relu", "gelu"))
    assert any(path.endswith("mlp/down/kernel") for path in moved) == (kind != "gelu")


@pytest.mark.slow
def test_norms_in_bfloat16_lose_nothing(model_of: MakeModel) -> None:
    """What the weight of a norm is rounded to is made good in the matrix."""
    model = with_outliers(model_of(layers=1, norm="rmsnorm", dtype="bfloat16"))
    walk = BlockWalk(model.model, jax.devices()[0], only="mlp/up/kernel")
    params, _ = scaled(model, walk)
    norm, old = (np.asarray(p["blocks"]["mlp_norm"]["weight"], float) for p in (params, model.params))
    up, before = (np.asarray(p["blocks"]["mlp"]["up"]["kernel"], float) for p in (params, model.params))
    assert params["blocks"]["mlp_norm"]["weight"].dtype == jnp.bfloat16 and np.abs(norm / old - 1).max() > 0.1
    np.testing.assert_allclose(norm[..., None] * up, old[..., None] * before, rtol=1e-6)


def layer() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, and inputs of which some are large: their Hessian and mean size."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(500, 64)) * np.where(np.arange(64) % 9 == 0, 30.0, 1.0)
    w = rng.normal(size=(64, 40)) * np.exp(0.5 * rng.normal(size=(64, 40)))
    return w, inputs.T @ inputs / 500, np.abs(inputs).mean(0)


def test_scales_are_the_best_of_twenty() -> None:
    w, hessian, mean = layer()
    rounded = lambda x: rounded_to_nearest(x, CONFIG)  # noqa: E731
    got = np.asarray(best_scale(jnp.float32(w), jnp.float32(hessian), jnp.float32(mean), rounded), float)
    costs, tried = [], []
    for alpha in np.arange(20) / 20:
        scale = np.maximum(mean**alpha, 1e-4)
        scale /= np.sqrt(scale.max() * scale.min())
        made = np.asarray(rounded(jnp.float32(w * scale[:, None])), float) / scale[:, None]
        costs.append(plain.output_error(w, made, hessian))
        tried.append(scale)
    assert 3 < np.argmin(costs) < 19
    np.testing.assert_allclose(got, tried[np.argmin(costs)], rtol=1e-5)
    assert min(costs) < 0.6 * costs[0]


def test_clipping_is_the_best_of_ten_for_each_group() -> None:
    w, hessian, _ = layer()
    rounded = lambda x: rounded_to_nearest(x, CONFIG)  # noqa: E731
    got = np.asarray(clipped(jnp.float32(w), jnp.float32(hessian), 16, rounded, 7), float)
    np.testing.assert_array_equal(got[:, :7], np.float32(w)[:, :7])
    for column in (7, 20, 39):
        for start in (0, 16, 48):
            own, part = w[start : start + 16, column], hessian[start : start + 16, start : start + 16]
            tried = [np.clip(own, -r, r) for r in np.abs(own).max() * (1 - np.arange(10) / 20)]
            off = [own - np.asarray(rounded(jnp.float32(each)[:, None]), float)[:, 0] for each in tried]
            best = np.argmin([each @ part @ each for each in off])
            np.testing.assert_allclose(got[start : start + 16, column], tried[best], rtol=1e-5)
    made = rewrite(jnp.float32(w), jnp.float32(hessian), CONFIG)
    bare = rewrite(jnp.float32(w), jnp.float32(hessian), resolved(CompressConfig(method="rtn", bits=3, group=16)))
    assert made.error < 0.95 * bare.error
    # The error is that of the weights before they were clipped.
    assert made.error == pytest.approx(plain.output_error(w, np.asarray(made.weights, float), hessian), rel=1e-3)


@pytest.mark.slow
def test_compressed_models_lose_less(model_of: MakeModel, text: str, tmp_path: Path) -> None:
    model = with_outliers(model_of(layers=2, norm="rmsnorm"))
    run = jax.jit(lambda params: model.model.hidden(params, jnp.asarray(TOKENS)))
    wanted, off = np.asarray(run(model.params)), {}
    options: dict[str, Any] = {"data": text, "sequences": 12, "sequence_length": 24, "bits": 3, "group": 16}
    errors = {}
    for method, awq in (("rtn", False), ("rtn", True), ("gptq", True)):
        made = compress_model(model, CompressConfig(method=method, awq=awq, **options), tmp_path / f"{method}-{awq}")
        off[method, awq] = float(np.mean((np.asarray(run(load_model(made.out).params)) - wanted) ** 2))
        errors[method, awq] = sum(matrix.error for matrix in made.matrices)
    assert off["rtn", True] < 0.8 * off["rtn", False]
    assert errors["gptq", True] < errors["rtn", True] < errors["rtn", False]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({}, {"method": "magnitude"}, "awq scales what rtn or gptq then round, got method magnitude"),
        ({}, {"method": "hqq"}, "awq scales what rtn or gptq then round, got method hqq"),
        ({}, {"method": "rtn", "bits": "ternary", "data": "x"}, "which ternary weights have not"),
        ({}, {"method": "rtn"}, "awq needs text that shows how large inputs are: give --data FILE"),
        ({"norm_affine": False}, {"data": "x"}, "its norms have none .model.norm_affine is false.: leave awq out"),
        ({"norm_position": "post"}, {"data": "x"}, "norms come after the sums"),
    ],
)
def test_what_cannot_be_is_one_message(
    model_of: MakeModel, tmp_path: Path, model: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, ModelError), match=message):
        compress_model(model_of(**model), CompressConfig(awq=True, **options), tmp_path / "model")
    assert not list(tmp_path.iterdir())
