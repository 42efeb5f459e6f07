"""HQQ: zeros that are refined without text, against its definition in float64."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.compress import compress_model
from cramjax.compress.hqq import find_refined_grid
from cramjax.compression import CompressConfig
from cramjax.kernels.packed import unpacked
from cramjax.language_model import LanguageModel, load_model


def refined(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Scales, the zeros with least error, and the errors of each turn; (groups, size, outer)."""
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    scale = (high - low) / (2**bits - 1)
    zero = -low / scale  # of codes from 0
    best, errors, beta = zero, [], 10.0
    for _ in range(21):
        codes = np.clip(np.rint(groups / scale + zero), 0, 2**bits - 1)
        off = groups - (codes - zero) * scale
        errors.append(np.abs(off).mean(1))
        if len(errors) > 1:
            best = np.where((errors[-1] < np.min(errors[:-1], axis=0))[:, None], zero, best)
        size = np.abs(off)
        sparse = np.sign(off) * np.maximum(size - np.where(size > 0, size, 1) ** -0.3 / beta, 0)
        zero = (codes - (groups - sparse) / scale).mean(1, keepdims=True)
        beta *= 1.01
    return scale[:, 0], best[:, 0], errors


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_zeros_are_refined_as_defined(bits: int) -> None:
    w = np.random.default_rng(bits).standard_t(4, size=(128, 30)).astype(np.float32)
    w[:64, 3] = 0.25  # all alike
    groups = w.reshape(2, 64, 30).astype(float)
    grid = find_refined_grid(jnp.asarray(w), bits=bits, group=64, scale_dtype="float32")
    with np.errstate(divide="ignore", invalid="ignore"):
        scale, zero, errors = refined(groups, bits)
    real = np.ones((2, 30), bool)
    real[0, 3] = False
    np.testing.assert_allclose(np.asarray(grid.scale)[real], scale[real], rtol=1e-5)
    got = np.asarray(grid.zero) + 2 ** (bits - 1)
    # A weight between two codes may be rounded otherwise in float32, and what follows differs then.
    assert np.isclose(got, zero, atol=1e-3)[real].mean() > 0.8
    made = np.asarray(grid.leaf(jnp.asarray(w)).unpacked())
    np.testing.assert_allclose(made[:64, 3], 0.25, rtol=1e-5)
    error = np.abs(made.reshape(2, 64, 30) - groups).mean(1)
    np.testing.assert_allclose(error[real], np.min(errors, axis=0)[real], rtol=0.01)
    assert (error <= errors[0] * (1 + 1e-5))[real].all() and error[real].mean() < 0.97 * errors[0][real].mean()
    # The codes are the nearest to these zeros.
    codes = np.asarray(grid.leaf(jnp.asarray(w)).codes()).reshape(2, 64, 30)
    own = [np.asarray(part, float)[:, None] for part in (grid.scale, grid.zero)]
    exact = np.clip(groups / own[0] + own[1], -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert np.abs(exact - codes).max() < 0.5 + 1e-4


@pytest.mark.slow
def test_models_need_no_text(model_of: Callable[..., LanguageModel], tmp_path: Path) -> None:
    model = model_of(layers=2)
    rtn = compress_model(model, CompressConfig(method="rtn", bits=3, symmetric=False), tmp_path / "rtn")
    made = compress_model(model, CompressConfig(method="hqq", bits=3), tmp_path / "hqq")
    assert sum(each.error for each in made.matrices) < sum(each.error for each in rtn.matrices)
    leaf = load_model(made.out).params["blocks"]["mlp"]["up"]["kernel"]
    assert not np.array_equal(leaf.zero, np.rint(np.asarray(leaf.zero, np.float32))) and leaf.zero.dtype == jnp.bfloat16
    kernel = np.asarray(model.params["blocks"]["mlp"]["up"]["kernel"], float)
    off = np.asarray(unpacked(leaf), float) - kernel
    found = [matrix.error for matrix in made.matrices if matrix.name == "mlp/up/kernel"]
    np.testing.assert_allclose(found, (off**2).sum((1, 2)) / (kernel**2).sum((1, 2)), rtol=1e-4)
