"""Rotations: orthogonal, through every part that reads or writes the stream, and good for rounding."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.compress import compress_model
from cramjax.compress.rotate import random_rotation, rotated_model
from cramjax.compression import CompressConfig
from cramjax.config import LayerConfig
from cramjax.errors import ConfigError, ModelError
from cramjax.experts import ExpertsConfig
from cramjax.language_model import LanguageModel, load_model

MakeModel = Callable[..., LanguageModel]
TOKENS = np.random.default_rng(0).integers(3, 290, (4, 16)).astype(np.int32)
RMS: dict[str, Any] = {"norm": "rmsnorm", "layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"kv_heads": 1, "width": 48, "heads": 2, "head_dim": 24, "bias": True},
    "extras": {
        "tied": False,
        "embedding_skip": True,
        "value_embeddings": True,
        "bigram_buckets": 16,
        "qk_norm": True,
        "positions": "learned",
        "head_bias": True,
    },
    "pattern": {
        "layers": 4,
        "pattern": (LayerConfig(attention_norm=False), LayerConfig(window=8)),
        "mup_base_width": 16,
    },
    "experts": {"experts": ExpertsConfig(number=4, active=2, shared=1, width=32)},
    "adaptive": {"tied": False, "adaptive_head": (100, 200), "norm_affine": False, "final_norm": True},
}


def logits(given: LanguageModel) -> np.ndarray:
    own, tokens = given.model, jnp.asarray(TOKENS)
    return np.asarray(jax.jit(lambda params: own.logits(params, own.hidden(params, tokens)))(given.params))


@pytest.mark.parametrize("width", [1, 7, 48, 64, 128, 576])
def test_rotations_are_orthogonal(width: int) -> None:
    rotation = random_rotation(width, np.random.default_rng(1))
    q = rotation(np.eye(width))
    np.testing.assert_allclose(q.T @ q, np.eye(width), atol=1e-12)
    w = np.random.default_rng(2).normal(size=(3, width, 5))
    np.testing.assert_allclose(rotation.rows(w), np.einsum("io,bij->boj", q, w), atol=1e-12)
    if width in (64, 128):  # Hadamard's: all entries of one size
        np.testing.assert_allclose(np.abs(q), width**-0.5, rtol=1e-12)


@pytest.mark.parametrize("kind", ["tied", *(pytest.param(k, marks=pytest.mark.slow) for k in list(MODELS)[1:])])
def test_the_model_computes_the_same(model_of: MakeModel, kind: str) -> None:
    model = model_of(**{**RMS, **MODELS[kind]})
    made = rotated_model(model, 0)
    assert not made.config.tied and jax.tree.structure(made.params) == jax.tree.structure(made.model.weights)
    wanted = logits(model)
    np.testing.assert_allclose(logits(made), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    for name in ("attention/qkv/kernel", "attention/out/kernel"):
        own = made.params["blocks"]["0"] if kind == "pattern" else made.params["blocks"]
        old = model.params["blocks"]["0"] if kind == "pattern" else model.params["blocks"]
        for key in name.split("/"):
            own, old = own[key], old[key]
        assert np.abs(own - np.asarray(old)).max() > 0.01
    if "norm_affine" not in MODELS[kind]:
        assert (made.params["head"]["norm"]["weight"] == 1).all()


@pytest.mark.slow
def test_outliers_are_spread(model_of: MakeModel, held_out: str, tmp_path: Path) -> None:
    """Channels of the stream that are much larger: rounding to the nearest loses less after a rotation."""
    model = model_of(**RMS)
    params = jax.tree.map(np.array, model.params)
    for channel in (3, 20):  # what writes to them is large, and so are norms' weights
        params["embed"]["token"]["table"][:, channel] *= 8
        params["blocks"]["attention"]["out"]["kernel"][:, :, channel] *= 8
        params["blocks"]["mlp"]["down"]["kernel"][:, :, channel] *= 8
        for part in ("attention", "mlp"):
            params["blocks"][f"{part}_norm"]["weight"][:, channel] *= 3
    model = replace(model, params=params)
    wanted, off = logits(model), {}
    for rotate in (False, True):
        out = tmp_path / str(rotate)
        config = CompressConfig(method="rtn", bits=4, group=None, rotate=rotate, text=held_out)
        made = compress_model(model, config, out)
        read = load_model(out)
        off[rotate] = float(np.mean((logits(read) - wanted) ** 2))
        assert made.bits_per_byte is not None
        sizes = {size.part: size for size in made.sizes}
        assert made.total.after == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(read.params))
        table = params["embed"]["token"]["table"]
        assert sizes["head"].after - sizes["head"].before == (table.nbytes if rotate else 0)
        assert ("the head is a matrix of its own" in str(made)) == rotate
    assert off[True] < 0.7 * off[False]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (RMS, {"method": "magnitude"}, "rotate spreads weights before they are rounded, got method magnitude"),
        ({}, {}, "cannot be rotated, because its norms subtract a mean .model.norm is layernorm.: leave rotate out"),
        ({**RMS, "norm_position": "sandwich"}, {}, "norm_position is sandwich"),
        ({**RMS, "positions": "sinusoidal"}, {}, "its positions are a fixed table"),
        ({**RMS, "embedding_norm": True}, {}, "weigh the stream itself after the embedding"),
    ],
)
def test_what_cannot_be_is_one_message(
    model_of: MakeModel, tmp_path: Path, model: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, ModelError), match=message):
        config = CompressConfig(**{"method": "rtn", "rotate": True, **options})
        compress_model(model_of(**model), config, tmp_path / "model")
    assert not list(tmp_path.iterdir())
