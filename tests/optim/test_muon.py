"""Muon's direction against the SVD, against optax.contrib, and its treatment of fused and stacked matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cramjax.config import OptimConfig
from cramjax.optim import make_optimizer
from cramjax.optim.muon import orthogonalize, scale_by_muon

from .trees import flatten, nest, random_flat

jitted = jax.jit(orthogonalize, static_argnums=1)
SHAPES = [(16, 16), (16, 20), (16, 64), (64, 16)]
# In float32, rounding in the Gram matrix (6e-8) is amplified by up to the squared slope at 0 of all iterations but the
# last: 3.4445^8 = 2e4 after five. Well-conditioned matrices see much less.
TOLERANCE = 2e-3


def newton_schulz(values, steps):
    """Jordan's quintic on singular values, as published."""
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


def by_svd(matrix, steps=5):
    """What the iteration computes, from the singular value decomposition in float64."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (u * newton_schulz(s / np.linalg.norm(s), steps)) @ vt


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_vectors_stay(shape):
    x = np.random.default_rng(0).standard_normal((3, *shape))
    got = np.asarray(jitted(jnp.asarray(x, jnp.float32), 5), np.float64)
    assert got.shape == x.shape
    for matrix, result in zip(x, got, strict=True):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ result @ vt.T
        np.testing.assert_allclose(inner - np.diag(np.diag(inner)), 0.0, atol=TOLERANCE)
        near = np.diag(inner)[s > 0.01 * np.linalg.norm(matrix)]
        assert near.size >= 15
        assert near.min() > 0.68 and near.max() < 1.21


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 5])
def test_both_forms_apply_the_quintic_to_the_singular_values(shape, steps):
    """Direct and Gram form, on singular values over eight orders of magnitude."""
    rng = np.random.default_rng(2)
    rank = min(shape)
    u, _ = np.linalg.qr(rng.standard_normal((shape[0], rank)))
    v, _ = np.linalg.qr(rng.standard_normal((shape[1], rank)))
    x = ((u * np.logspace(0, -8, rank)) @ v.T).astype(np.float32)
    np.testing.assert_allclose(jitted(jnp.asarray(x), steps), by_svd(x, steps), atol=TOLERANCE)


def test_a_zero_gradient_gives_a_zero_update():
    assert not jitted(jnp.zeros((2, 8, 24)), 5).any()


def test_scale_does_not_matter():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((8, 8)), jnp.float32)
    np.testing.assert_allclose(jitted(1e-3 * x, 5), jitted(1e3 * x, 5), atol=1e-3)


def test_first_direction_equals_optax_contrib():
    """Same iteration, shape scaling and treatment of layers as `optax.contrib.muon`.

    Later directions differ: optax corrects its momentum's bias as NAdam does, Jordan's Muon does not.
    """
    shapes = {"blocks/a/kernel": (2, 8, 20), "blocks/b/kernel": (2, 20, 8), "blocks/c/kernel": (2, 8, 8)}
    axes = nest({path: optax.contrib.MuonDimensionNumbers(-2, -1) for path in shapes})
    peer = optax.contrib.muon(-1.0, muon_weight_dimension_numbers=axes)
    ours = scale_by_muon(0.95, 5)
    gradient = nest(random_flat(0, shapes))
    want, _ = jax.jit(peer.update)(gradient, peer.init(gradient), gradient)
    got, _ = jax.jit(ours.update)(gradient, ours.init(gradient))
    for path, x in flatten(want).items():
        np.testing.assert_allclose(flatten(got)[path], x, atol=TOLERANCE)


def test_momentum_is_jordans():
    """github.com/KellerJordan/Muon: buf ← βbuf + (1 − β)g, then the quintic of (1 − β)g + βbuf, times its scale."""
    shapes = {"blocks/a/kernel": (2, 8, 12)}
    ours = scale_by_muon(0.9, 5)
    update = jax.jit(ours.update)
    state, buffer = ours.init(nest(random_flat(0, shapes))), 0.0
    for seed in range(4):
        gradient = random_flat(seed, shapes)
        got, state = update(nest(gradient), state)
        g = np.float64(gradient["blocks/a/kernel"])
        buffer = 0.9 * buffer + 0.1 * g
        for layer, mixed in zip(got["blocks"]["a"]["kernel"], 0.1 * g + 0.9 * buffer, strict=True):
            np.testing.assert_allclose(layer, (12 / 8) ** 0.5 * by_svd(mixed), atol=TOLERANCE)


def test_update_scale_is_the_root_of_outputs_per_input():
    """Jordan et al. 2024: max(1, columns / rows)^½ for a kernel of rows inputs and columns outputs."""
    shapes = {"blocks/up/kernel": (2, 8, 32), "blocks/down/kernel": (2, 32, 8)}
    gradient = nest(random_flat(0, shapes))
    ours = scale_by_muon(0.95, 5)
    updates, _ = jax.jit(ours.update)(gradient, ours.init(gradient))
    for path, scale in {"blocks/up/kernel": 2.0, "blocks/down/kernel": 1.0}.items():
        for layer, g in zip(flatten(updates)[path], flatten(gradient)[path], strict=True):
            np.testing.assert_allclose(layer, scale * by_svd(g), atol=TOLERANCE)


def test_fused_matrices_and_layers_are_orthogonalised_apart():
    shapes = {"blocks/attention/qkv/kernel": (3, 8, 16)}
    widths = (8, 4, 4)
    params, gradient = nest(random_flat(0, shapes)), nest(random_flat(1, shapes))
    config = OptimConfig(name="muon", lr=1.0, clip=None, schedule="constant")
    optimizer = make_optimizer(config, params, splits={"blocks/attention/qkv/kernel": widths})
    moved, _, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params, 0.0)
    kernel = lambda tree: tree["blocks"]["attention"]["qkv"]["kernel"]  # noqa: E731
    for step, g in zip(kernel(params) - kernel(moved), kernel(gradient), strict=True):
        want = [by_svd(piece) for piece in np.split(np.asarray(g), np.cumsum(widths)[:-1], axis=1)]
        np.testing.assert_allclose(step, np.concatenate(want, axis=1), atol=TOLERANCE)
