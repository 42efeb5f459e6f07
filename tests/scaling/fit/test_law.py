"""The law's derivatives, its solver and what it says of noise, against finite differences and scipy."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from cramjax.scaling.fit.law import Law, curvature_scale, huber, minimise, noise_of
from cramjax.scaling.fit.solvers import _value_and_gradient, lbfgs, project, variable_projection
from tests.scaling.fit.tables import CHINCHILLA, isoflop_table


def law_of(table: dict, delta: float = 1e-3) -> Law:
    return Law(*(np.log(table[name]) for name in ("params", "tokens", "loss")), delta)


def test_derivatives_are_finite_differences():
    law = law_of(isoflop_table(CHINCHILLA, noise=0.01))
    theta = law.centred(np.array([1.5, 300.0, 500.0, 0.3, 0.3]))[None]
    _, jacobian = law.derivatives(theta)
    for i in range(5):
        step = np.zeros((1, 5))
        step[0, i] = 1e-6
        difference = (law.residuals(theta - step) - law.residuals(theta + step)) / 2e-6
        np.testing.assert_allclose(jacobian[0, :, i], difference[0], rtol=1e-6, atol=1e-9)  # error of 1e-6 squared
    point = np.array([[6.0, 6.5, 0.4, 0.3, 0.27]])
    _, gradient = _value_and_gradient(law, point)
    for i in range(5):
        step = np.zeros((1, 5))
        step[0, i] = 1e-7
        difference = (_value_and_gradient(law, point + step)[0] - _value_and_gradient(law, point - step)[0]) / 2e-7
        np.testing.assert_allclose(gradient[0, i], difference[0], rtol=1e-5)


def test_coefficients_survive_centring():
    law = law_of(isoflop_table(CHINCHILLA))
    natural = np.array([1.69, 406.4, 410.7, 0.34, 0.28])
    np.testing.assert_allclose(law.natural(law.centred(natural)), natural, rtol=1e-13)
    np.testing.assert_allclose(law.residuals(law.centred(natural)[None]), 0, atol=1e-14)


@pytest.mark.parametrize("delta", [1e-3, 1.0])
def test_solver_reaches_scipys_minimum(delta: float):
    law = law_of(isoflop_table(CHINCHILLA, noise=0.005, seed=1), delta)
    start = law.centred(np.array([1.5, 300.0, 500.0, 0.3, 0.3]))
    peer = least_squares(
        lambda theta: law.residuals(theta[None])[0],
        start,
        loss="huber",
        f_scale=delta,
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
    )
    found = minimise(law, start[None])
    assert law.objective(found)[0] <= peer.cost * (1 + 1e-9)
    # scipy's loss is convex but it treats the kinks as smooth curvature: it stops within 1e-4 of the minimum
    np.testing.assert_allclose(found[0], peer.x, rtol=1e-3, atol=1e-3)


def test_weights_are_repeated_rows():
    table = isoflop_table(CHINCHILLA, noise=0.005, seed=2)
    law = law_of(table)
    weights = np.random.default_rng(0).integers(0, 3, len(law.x))
    repeated = Law(*(np.repeat(np.log(table[name]), weights) for name in ("params", "tokens", "loss")), 1e-3)
    start = law.centred(np.array([1.5, 300.0, 500.0, 0.3, 0.3]))[None]
    weighted = law.natural(minimise(law, start, weights=weights[None].astype(float)))
    again = repeated.natural(minimise(repeated, repeated.centred(law.natural(start))))
    np.testing.assert_allclose(weighted, again, rtol=1e-6)


def test_projection_is_non_negative_least_squares():
    from scipy.optimize import nnls

    table = isoflop_table(CHINCHILLA, noise=0.3, seed=4)
    law = law_of(table, delta=1e3)  # so wide that one sweep is plain weighted least squares
    alpha, beta = np.array([0.3, 0.1, 1.5]), np.array([0.2, 1.0, 0.02])
    found = project(law, alpha, beta, sweeps=1)
    loss = table["loss"]
    for i in range(3):
        columns = np.stack([np.ones_like(law.x), np.exp(-alpha[i] * law.x), np.exp(-beta[i] * law.z)], -1)
        expected, _ = nnls(columns / loss[:, None], np.ones_like(loss))
        np.testing.assert_allclose(found[i], expected, rtol=1e-6, atol=1e-9)


def test_variable_projection_agrees_with_lbfgs():
    for noise in (0.0, 0.003, 0.01):
        law = law_of(isoflop_table(CHINCHILLA, noise=noise, seed=5))
        near = np.array([[a, b, e, 0.5, 0.5] for a in (5, 10) for b in (5, 10) for e in (0, 0.5)], dtype=float)
        projected, descended = law.natural(variable_projection(law)), law.natural(lbfgs(law, near))
        np.testing.assert_allclose(projected, descended, rtol=1e-5)  # L-BFGS stops at 1e-12 of the objective


@pytest.mark.slow
def test_variable_projection_agrees_with_the_best_published_start():
    law = law_of(isoflop_table(CHINCHILLA, noise=0.01, seed=6))
    projected, descended = variable_projection(law), lbfgs(law)
    values = law.objective(np.stack([projected, descended]))
    assert values[0] <= values[1] * (1 + 1e-9)
    np.testing.assert_allclose(law.natural(projected), law.natural(descended), rtol=1e-5)


def test_noise_without_kinks_is_the_residual_variance():
    residuals = np.random.default_rng(0).standard_normal(40) * 0.01
    noise = noise_of(float(huber(residuals, 10.0).sum()), 40, 5, 10.0)
    np.testing.assert_allclose(noise, np.sqrt((residuals**2).sum() / 35), rtol=1e-9)
    np.testing.assert_allclose(curvature_scale(noise, 10.0), noise**2, rtol=1e-9)


def test_noise_of_a_narrow_huber_loss_is_found():
    draws = np.random.default_rng(0).standard_normal(400_000) * 0.01
    assert noise_of(float(huber(draws, 1e-3).sum()), len(draws), 0, 1e-3) == pytest.approx(0.01, rel=5e-3)
    slope = np.clip(draws, -1e-3, 1e-3)
    expected = (slope**2).mean() / (np.abs(draws) < 1e-3).mean()
    assert curvature_scale(0.01, 1e-3) == pytest.approx(expected, rel=2e-2)  # 8% of the draws are inside δ
