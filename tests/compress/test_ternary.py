"""Ternary weights: the grid and GPTQ on it against float64, and a model that is written in words."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.compress import compress_model
from cramjax.compress.matrix import rewrite
from cramjax.compression import CompressConfig, resolved
from cramjax.errors import ConfigError, ModelError
from cramjax.evaluation import evaluate_text
from cramjax.kernels.packed import Coded, unpacked
from cramjax.language_model import LanguageModel, load_model

from . import plain
from .test_matrix import INNER, OUTER, layer, made

MakeModel = Callable[..., LanguageModel]


def on_grid(w: np.ndarray, reach: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return np.where(w < reach[0] / 2, levels[0], np.where(w > reach[1] / 2, levels[1], 0.0))


@pytest.mark.parametrize("levels", ["means", "extremes"])
def test_gptq_is_that_of_the_paper(levels: str) -> None:
    w, hessian = layer(seed=3)
    got = made(w, hessian, method="gptq", bits="ternary", levels=levels)
    assert isinstance(got.leaf, Coded)
    reach = np.stack([np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)])
    exact = reach
    if levels == "means":
        sides = (w < reach[0] / 2, w > reach[1] / 2)
        exact = np.stack([(w * side).sum(0) / side.sum(0) for side in sides])
    np.testing.assert_allclose(np.float64(got.leaf.levels), exact, rtol=2**-8)  # bfloat16
    rounded = np.float64(got.leaf.levels)
    wanted, inv, nearest_edge = w.copy(), plain.inverse(hessian, 0.01), np.ones(w.shape)
    for i in range(INNER):
        row = wanted[i].copy()
        wanted[i] = on_grid(row, reach, rounded)
        nearest_edge[i] = np.abs(row - reach / 2).min(0) / np.abs(row).max()
        wanted[i + 1 :] -= np.outer(inv[i + 1 :, i], (row - wanted[i]) / inv[i, i])
        inv = plain.without(inv, i)
    differs = np.asarray(got.weights) != wanted
    columns, first = np.flatnonzero(differs.any(0)), differs.argmax(0)
    # Of each output all is equal, until float32 rounds a weight at an edge to the other side.
    assert all(nearest_edge[first[column], column] < 1e-3 for column in columns) and len(columns) <= OUTER // 6
    rtn = made(w, hessian, method="rtn", bits="ternary", levels=levels)
    np.testing.assert_array_equal(np.asarray(rtn.weights), on_grid(w, reach, rounded))
    assert got.error < 0.8 * rtn.error
    np.testing.assert_array_equal(unpacked(jax.tree.map(jnp.asarray, got.leaf)), got.weights)


def test_means_err_less_than_extremes_on_gaussian_rows() -> None:
    """By about a quarter of the energy at the same share of zeros."""
    w = jnp.float32(np.random.default_rng(0).normal(size=(768, 64)))
    errors, zeros = [], []
    for levels in ("means", "extremes"):
        config = resolved(CompressConfig(method="rtn", bits="ternary", levels=levels))
        found = rewrite(w, None, config)
        errors.append(found.error)
        zeros.append(found.zeros)
    assert zeros[0] == zeros[1] == pytest.approx(0.88, abs=0.02)
    assert errors[1] == pytest.approx(0.69, abs=0.03)  # of Gaussian rows of 768, by another implementation
    assert errors[0] < 0.85 * errors[1]


@pytest.mark.slow
def test_a_ternary_model_is_small_in_files_and_is_used(
    model_of: MakeModel, text: str, held_out: str, tmp_path: Path
) -> None:
    model = model_of()
    options = {"sequences": 8, "sequence_length": 24, "batch": 4}
    config = CompressConfig(method="gptq", bits="ternary", data=text, text=held_out, **options)
    told: list[str] = []

    def stop(what: str, done: int, total: int) -> None:
        told.append(what)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(model, config, tmp_path / "small", tell=stop)
    found = compress_model(model, config, tmp_path / "small")
    whole = compress_model(model, config, tmp_path / "again")
    names = {file.name for file in found.out.iterdir()} - {"origin.json", "report.html"}  # which hold times
    assert all((found.out / name).read_bytes() == (whole.out / name).read_bytes() for name in names)
    read = load_model(found.out)
    leaf = read.params["blocks"]["mlp"]["up"]["kernel"]
    assert isinstance(leaf, Coded) and leaf.shape == model.params["blocks"]["mlp"]["up"]["kernel"].shape
    assert found.bits_per_byte is not None
    scored = evaluate_text(read, held_out).bits_per_byte  # pyright: ignore
    assert scored == pytest.approx(found.bits_per_byte[1], rel=1e-4)
    matrices = next(size for size in found.sizes if size.part == "matrices of blocks")
    index = json.loads((found.out / "weights.index.json").read_text(encoding="utf-8"))
    assert set(index["coded"]) == {name for name in index["adapters"]} and len(index["coded"]) == 4
    stored = sum(f.stat().st_size for f in found.out.glob("*.safetensors"))
    assert stored == pytest.approx(found.total.after, rel=0.05)
    assert matrices.after < matrices.before / 8
    index["coded"]["blocks/mlp/up/kernel"]["words"] += 1
    (found.out / "weights.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match="the code of blocks/mlp/up/kernel is damaged"):
        load_model(found.out)


def test_what_cannot_be_ternary_is_said() -> None:
    with pytest.raises(ConfigError, match="made by rtn and gptq, without act_order: change method"):
        resolved(CompressConfig(method="wanda", data="a", bits="ternary"))
    with pytest.raises(ConfigError, match="change act_order"):
        resolved(CompressConfig(data="a", bits="ternary", act_order=True))
    with pytest.raises(ConfigError, match="one of 8, 4, 3, 2, ternary, nf4, fp8, mxfp4, got 5"):
        resolved(CompressConfig(data="a", bits=5))
