"""Compressions by name on a tiny model; and activations of 8 bits, wherever a model is used."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.compress import compress_model
from cramjax.errors import ConfigError
from cramjax.evaluation import evaluate_text
from cramjax.experts import ExpertsConfig
from cramjax.kernels.dense.few_rows import refusal
from cramjax.kernels.packed import Coded, Quantised, Streamed, is_packed, quantise, rounding_rows
from cramjax.language_model import LanguageModel, load_model
from cramjax.recipes import compression_names, load_compression

MakeModel = Callable[..., LanguageModel]
OPTIONS: dict[str, Any] = {"sequences": 6, "sequence_length": 24, "batch": 6}
EXPERTS = ExpertsConfig(number=2, active=1, shared=1, width=32)


def test_rows_are_rounded_by_definition() -> None:
    """With a gradient to them as they are."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 32), (32, 24)))
    x = x.at[2, 16:].set(0.0)
    plain = quantise(w, 4, 16)
    (rounds,) = rounding_rows([plain])
    own, matrix = np.asarray(x, np.float64).reshape(5, 2, 16), np.asarray(plain.unpacked(), np.float64)
    step = np.abs(own).max(-1, keepdims=True) / 127
    near = (np.rint(own / np.where(step == 0, 1, step)) * step).reshape(5, 32)
    np.testing.assert_allclose(rounds.multiply(x, jnp.float32), near @ matrix, atol=1e-5)
    assert np.abs(near @ matrix - np.asarray(x, np.float64) @ matrix).max() > 1e-3
    slopes = [jax.grad(lambda x, leaf=leaf: jnp.sum(leaf.multiply(x, jnp.float32)))(x) for leaf in (plain, rounds)]
    np.testing.assert_array_equal(*slopes)


@pytest.mark.slow
@pytest.mark.skipif(refusal() is not None, reason=f"the kernel cannot run here: {refusal()}")
@pytest.mark.parametrize("rows", [5, 20])
def test_the_kernel_rounds_alike(rows: int) -> None:
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((rows, 32), (32, 24)))
    (rounded,) = rounding_rows([quantise(w, 4, 16)])
    streamed = Streamed(rounded, rounds=True).multiply(x, jnp.float32)
    np.testing.assert_allclose(streamed, rounded.multiply(x, jnp.float32), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w4", "w3", "w4a8", "2of4", "moe-sub1"])
def test_every_compression_by_name(model_of: MakeModel, text: str, held_out: str, tmp_path: Path, name: str) -> None:
    assert {"w4", "w3", "w4a8", "2of4", "moe-sub1"} <= set(compression_names())
    model = model_of(layers=2, experts=EXPERTS if name in ("moe-sub1", "w4a8") else None)
    config = load_compression(name, {"data": text, "text": held_out, **OPTIONS})
    made = compress_model(model, config, tmp_path / "model")
    read = load_model(made.out)
    leaves = {type(leaf) for leaf in jax.tree.leaves(read.params["blocks"], is_leaf=is_packed) if is_packed(leaf)}
    assert leaves == {"2of4": set(), "moe-sub1": {Coded}}.get(name, {Quantised})
    assert made.bits_per_byte is not None
    found = evaluate_text(read, held_out).bits_per_byte
    assert found == pytest.approx(made.bits_per_byte[1], rel=1e-5)  # what is said is what is read again
    if name == "w4a8":
        quantised = [leaf for leaf in jax.tree.leaves(read.params, is_leaf=is_packed) if is_packed(leaf)]
        assert len(quantised) == 6 and all(leaf.rounds for leaf in quantised)
        loose = jax.tree.map(
            lambda leaf: replace(leaf, rounds=False) if is_packed(leaf) else leaf, read.params, is_leaf=is_packed
        )
        exact = evaluate_text(replace(read, params=loose), held_out).bits_per_byte
        assert 0 < abs(exact - found) < 0.05


def test_activations_of_other_bits_are_refused() -> None:
    for options in ({"activation_bits": 4}, {"activation_bits": 8, "bits": "ternary"}):
        with pytest.raises(ConfigError, match="activation_bits may be 8, beside bits of 8, 4, 3 or 2"):
            from cramjax.compression import CompressConfig, resolved

            resolved(CompressConfig(method="rtn", **options))
