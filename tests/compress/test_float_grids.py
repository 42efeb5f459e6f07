"""Matrices on grids of floating point numbers, against float64, and models of them that are used like any other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cramjax.compress import compress_model
from cramjax.compress.matrix import Rewritten, rewrite
from cramjax.compression import CompressConfig, resolved
from cramjax.evaluation import evaluate_text
from cramjax.kernels.packed import Float8, LowRank, Microscaled, NormalFloat, is_packed, unpacked
from cramjax.kernels.packed.normal_float import NF4
from cramjax.language_model import LanguageModel, load_model
from cramjax.serve import generate
from cramjax.training import train
from tests.training.conftest import configuration

from . import plain
from .test_matrix import layer

KINDS = {"nf4": NormalFloat, "fp8": Float8, "mxfp4": Microscaled}
NUMBERS = {
    "nf4": NF4.astype(float),
    "fp8": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(float),
    "mxfp4": np.arange(16, dtype=np.uint8).astype(ml_dtypes.uint4).view(ml_dtypes.float4_e2m1fn).astype(float),
}


def scales(leaf: Any) -> np.ndarray:
    """Of each weight, float64, from what is stored."""
    if isinstance(leaf, Microscaled):
        own = np.asarray(leaf.exponent).view(ml_dtypes.float8_e8m0fnu).astype(float)
    else:
        own = np.asarray(leaf.scales() if isinstance(leaf, NormalFloat) else leaf.scale).astype(float)
    return np.repeat(own, leaf.shape[0] // len(own), axis=0)


def nearest(kind: str, w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    numbers = np.unique(NUMBERS[kind][np.isfinite(NUMBERS[kind])])
    return numbers[np.argmin(np.abs(w[..., None] / scale[..., None] - numbers), axis=-1)] * scale


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_on_the_grid(kind: Any) -> None:
    w, hessian = layer(seed=3)

    def made(**options: Any) -> Rewritten:
        config = resolved(CompressConfig(data="text", bits=kind, group=64, **options))
        return rewrite(jnp.float32(w), jnp.float32(hessian), config)

    rtn, searched, gptq = made(method="rtn"), made(method="rtn", mse=True), made(method="gptq", act_order=False)
    assert type(rtn.leaf) is KINDS[kind]
    np.testing.assert_allclose(rtn.weights, nearest(kind, w, scales(rtn.leaf)), rtol=1e-5, atol=1e-6)
    # A group's largest weight is the largest number, or has its exponent; scales of NF4 are rounded to 8 bits.
    group = 32 if kind == "mxfp4" else 64
    largest = np.abs(w.reshape(-1, group, w.shape[1])).max(1)
    own = scales(rtn.leaf)[::group]
    if kind == "mxfp4":
        np.testing.assert_array_equal(own, 2.0 ** (np.floor(np.log2(largest)) - 2))
    else:
        np.testing.assert_allclose(own, largest / (448 if kind == "fp8" else 1), rtol=0.03 if kind == "nf4" else 4e-3)
    powers = [(np.abs(np.asarray(each.weights) - w) ** 2.4).sum() for each in (rtn, searched)]
    assert powers[1] < powers[0]
    # GPTQ, by elimination in float64, on the same grid: but for columns with a weight between two numbers.
    scale = scales(gptq.leaf)
    np.testing.assert_array_equal(scale, scales(rtn.leaf))
    wanted, _ = plain.sparsegpt(w, hessian, 0.01, rounded=lambda i, row: nearest(kind, row, scale[i]))
    same = np.isclose(np.asarray(gptq.weights), wanted, rtol=1e-4, atol=1e-5).all(0)
    assert same.mean() > 0.8
    assert gptq.error < 0.7 * rtn.error
    assert gptq.error == pytest.approx(plain.output_error(w, wanted, hessian), rel=0.05)


@pytest.mark.slow
def test_zeros_stay_zero() -> None:
    w, hessian = layer(seed=4)
    for kind in KINDS:
        config = resolved(CompressConfig(method="sparsegpt", data="text", bits=kind))  # pyright: ignore
        made = rewrite(jnp.float32(w), jnp.float32(hessian), config)
        assert made.zeros >= 0.5 and type(made.leaf) is KINDS[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_them_are_used_like_any_other(
    model_of: Callable[..., LanguageModel], held_out: str, tmp_path: Path, kind: Any
) -> None:
    model = model_of(layers=2)
    made = compress_model(model, CompressConfig(method="rtn", bits=kind, text=held_out), tmp_path / "model")
    (size,) = (size for size in made.sizes if size.part == "matrices of blocks")
    leaves = [leaf for leaf in jax.tree.leaves(load_model(made.out).params, is_leaf=is_packed) if is_packed(leaf)]
    assert len(leaves) == 4 and all(type(leaf) is KINDS[kind] for leaf in leaves)
    assert size.after == sum(np.asarray(part).nbytes for leaf in leaves for part in jax.tree.leaves(leaf))
    if kind != "nf4":
        # A bfloat16 for 32 inputs, and for 64 of the fifth of weights in `down`; or a byte for 32.
        assert size.bits == {"fp8": 8 + 16 * (0.8 / 32 + 0.2 / 64), "mxfp4": 4.25}[kind]
    read = load_model(made.out)
    dense = replace(read, params=jax.tree.map(unpacked, read.params, is_leaf=is_packed))
    assert made.bits_per_byte is not None
    assert made.bits_per_byte[1] == pytest.approx(evaluate_text(dense, held_out).bits_per_byte, rel=1e-4)
    texts = [generate(each, "the", max_tokens=8, temperature=0.0)[0].text for each in (read, dense)]
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_tuned_as_they_are(
    model_of: Callable[..., LanguageModel], corpus: Path, cache_directory: Path, tmp_path: Path, kind: Any
) -> None:
    made = compress_model(model_of(layers=1), CompressConfig(method="rtn", bits=kind), tmp_path / "model")
    options = {"start_from": str(made.out), "data__sequence_length": 24, "budget": "3steps", "optim__name": "adamw"}
    adapter = {"adapter__kind": "lora", "adapter__rank": 2, "adapter__base": kind}
    run = train(configuration(corpus, **options, **adapter), tmp_path / "run")
    tuned = run.params["blocks"]["mlp"]["up"]["kernel"]
    before = load_model(made.out).params["blocks"]["mlp"]["up"]["kernel"]
    assert isinstance(tuned, LowRank) and type(tuned.base) is KINDS[kind]
    np.testing.assert_array_equal(tuned.base.unpacked(), before.unpacked())  # not rounded once more
    assert bool(jnp.any(tuned.b != 0))
