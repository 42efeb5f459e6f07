"""Muon's direction against the SVD, against optax.contrib, and its treatment of fused and stacked matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cramjax.config import OptimConfig
from cramjax.optim import make_optimizer
from cramjax.optim.muon import _coefficients, orthogonalize, scale_by_muon

from .trees import flatten, nest, random_flat

jitted = jax.jit(orthogonalize, static_argnums=1)
SHAPES = [(16, 16), (16, 20), (16, 64), (64, 16)]
# What five iterations leave of the singular values between 1e-3 and 1 (of the Frobenius norm): see `orthogonalize`.
BOUND = 0.16


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_become_one_and_vectors_stay(shape):
    x = np.random.default_rng(0).standard_normal((3, *shape))
    got = np.asarray(jitted(jnp.asarray(x, jnp.float32), 5), np.float64)
    assert got.shape == x.shape
    for matrix, result in zip(x, got, strict=True):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        assert s.min() / np.linalg.norm(matrix) > 1e-3
        assert np.linalg.norm(result - u @ vt, 2) < BOUND
        inner = u.T @ result @ vt.T
        np.testing.assert_allclose(inner - np.diag(np.diag(inner)), 0.0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_many_iterations_reach_the_polar_factor(shape):
    x = np.random.default_rng(1).standard_normal(shape)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(jitted(jnp.asarray(x, jnp.float32), 9), u @ vt, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [3, 5])
def test_both_forms_apply_the_polynomials_to_the_singular_values(shape, steps):
    """Direct and Gram form, on singular values over eight orders of magnitude, against the SVD in float64."""
    rng = np.random.default_rng(2)
    rank = min(shape)
    u, _ = np.linalg.qr(rng.standard_normal((shape[0], rank)))
    v, _ = np.linalg.qr(rng.standard_normal((shape[1], rank)))
    s = np.logspace(0, -8, rank)
    y = s / (1.01 * np.linalg.norm(s))
    for a, b, c in _coefficients(steps):
        y = a * y + b * y**3 + c * y**5
    got = jitted(jnp.asarray((u * s) @ v.T, jnp.float32), steps)
    # Rounding in the Gram matrix (6e-8) is amplified by at most the squared slope at 0 of four iterations (1.8e5).
    np.testing.assert_allclose(got, (u * y) @ v.T, atol=1e-2)


def test_a_zero_gradient_gives_a_zero_update():
    assert not jitted(jnp.zeros((2, 8, 24)), 5).any()


def test_scale_does_not_matter():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((8, 8)), jnp.float32)
    np.testing.assert_allclose(jitted(1e-3 * x, 5), jitted(1e3 * x, 5), atol=1e-3)


def test_first_direction_equals_optax_contrib():
    """Same iteration and scaling as `optax.contrib.muon`, given the same coefficients.

    Later directions differ: optax corrects its momentum's bias as NAdam does, Jordan's Muon has none.
    """
    shapes = {"blocks/a/kernel": (2, 8, 20), "blocks/b/kernel": (2, 20, 8), "blocks/c/kernel": (2, 8, 8)}
    axes = nest({path: optax.contrib.MuonDimensionNumbers(-2, -1) for path in shapes})
    # optax divides by the Frobenius norm, we by 1.01 times it: undone here, in its own coefficients.
    first, *rest = _coefficients(5)
    scaled = tuple(x / 1.01**power for x, power in zip(first, (1, 3, 5), strict=True))
    peer = optax.contrib.scale_by_muon(ns_coeffs=(scaled, *rest), weight_dimension_numbers=axes)
    ours = scale_by_muon(0.95, 5)
    gradient = nest(random_flat(0, shapes))
    want, _ = jax.jit(peer.update)(gradient, peer.init(gradient))
    got, _ = jax.jit(ours.update)(gradient, ours.init(gradient))
    for path, x in flatten(want).items():
        scale = max(1.0, x.shape[-1] / x.shape[-2]) ** 0.5
        np.testing.assert_allclose(flatten(got)[path], scale * x, atol=1e-4)


def test_momentum_is_jordans():
    """github.com/KellerJordan/Muon: buf ← βbuf + (1 − β)g, then the polar factor of (1 − β)g + βbuf."""
    shapes = {"blocks/a/kernel": (2, 8, 12)}
    ours = scale_by_muon(0.9, 9)
    state, buffer = ours.init(nest(random_flat(0, shapes))), 0.0
    update = jax.jit(ours.update)
    for seed in range(4):
        gradient = random_flat(seed, shapes)
        got, state = update(nest(gradient), state)
        g = np.float64(gradient["blocks/a/kernel"])
        buffer = 0.9 * buffer + 0.1 * g
        u, _, vt = np.linalg.svd(0.1 * g + 0.9 * buffer, full_matrices=False)
        np.testing.assert_allclose(got["blocks"]["a"]["kernel"], (12 / 8) ** 0.5 * u @ vt, atol=1e-4)


def test_update_scale_is_the_root_of_outputs_per_input():
    """Jordan et al. 2024: singular values ≈ max(1, columns / rows)^½ for a kernel of rows inputs, columns outputs."""
    shapes = {"blocks/up/kernel": (2, 8, 32), "blocks/down/kernel": (2, 32, 8)}
    gradient = nest(random_flat(0, shapes))
    ours = scale_by_muon(0.95, 9)
    updates, _ = jax.jit(ours.update)(gradient, ours.init(gradient))
    for path, scale in {"blocks/up/kernel": 2.0, "blocks/down/kernel": 1.0}.items():
        values = np.linalg.svd(flatten(updates)[path], compute_uv=False)
        np.testing.assert_allclose(values, scale, rtol=1e-4)


def test_fused_matrices_and_layers_are_orthogonalised_apart():
    shapes = {"blocks/attention/qkv/kernel": (3, 8, 16)}
    widths = (8, 4, 4)
    params = nest(random_flat(0, shapes))
    gradient = nest(random_flat(1, shapes))
    config = OptimConfig(name="muon", lr=1.0, clip=None, schedule="constant", newton_schulz_steps=9)
    optimizer = make_optimizer(config, params, splits={"blocks/attention/qkv/kernel": widths})
    moved, _, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params, 0.0)
    step = np.asarray(params["blocks"]["attention"]["qkv"]["kernel"] - moved["blocks"]["attention"]["qkv"]["kernel"])
    for layer in step:
        for piece in np.split(layer, np.cumsum(widths)[:-1], axis=1):
            np.testing.assert_allclose(np.linalg.svd(piece, compute_uv=False), 1.0, atol=1e-4)
