"""The parametric fit: recovery, optima, intervals and warnings."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize, minimize_scalar

from cramjax.errors import ConfigError
from cramjax.scaling import Columns, fit_parametric, read_runs
from cramjax.scaling.fit.intervals import correlation, critical_value
from cramjax.scaling.fit.law import curvature_scale
from cramjax.scaling.fit.parametric import FlopsLaw, _log_loss, _log_size, _size_exponent
from tests.scaling.fit.tables import CHINCHILLA, REPLICATED, grid_table, isoflop_table, loss_of, noisy


@pytest.mark.parametrize("truth", [CHINCHILLA, REPLICATED], ids=["chinchilla", "replicated"])
@pytest.mark.parametrize("table", [isoflop_table, grid_table])
@pytest.mark.parametrize("method", ["profile", "bootstrap"])
def test_a_table_without_noise_gives_its_law(truth, table, method):
    fit = fit_parametric(read_runs(table(truth)), intervals=method, samples=100)
    for name, value in truth.items():
        assert getattr(fit, name) == pytest.approx(value, rel=1e-8)
        low, high = fit.intervals[name]
        assert low <= value <= high and high - low < 1e-4 * value
    assert fit.a == pytest.approx(truth["beta"] / (truth["alpha"] + truth["beta"]), rel=1e-9)
    assert fit.a + fit.b == pytest.approx(1)
    assert not any("weakly" in warning for warning in fit.warnings)


def test_the_optimum_is_the_lowest_loss_at_those_flops():
    fit = fit_parametric(read_runs(isoflop_table(CHINCHILLA, noise=0.003)))
    best = fit.optimum(5.76e23)
    found = minimize_scalar(lambda log_n: float(fit.loss(np.exp(log_n), 5.76e23 / 6 / np.exp(log_n))), bounds=(15, 35))
    assert best.params == pytest.approx(np.exp(found.x), rel=1e-3)  # a minimum is flat
    assert best.loss == pytest.approx(found.fun, rel=1e-9)
    assert best.params * best.tokens * 6 == pytest.approx(5.76e23)
    for name in ("params", "tokens", "loss"):
        low, high = best.intervals[name]
        assert low < getattr(best, name) < high


def test_a_size_next_to_nothing_could_be_trained_for_ever():
    """Few rows give intervals that reach down to such sizes: 1e-320 is a number, and to a power of two 0."""
    flat = FlopsLaw(coefficient=6.0, exponent=2.0)
    fit = replace(fit_parametric(read_runs(isoflop_table(CHINCHILLA))), flops_law=flat)
    assert fit.tokens_for(1e-320, 1e18) == np.inf
    np.testing.assert_array_equal(fit.tokens_for(np.array([1e-320, 1.0]), 6.0), [np.inf, 1.0])


def test_the_exponents_are_those_of_the_optima():
    table = isoflop_table(CHINCHILLA, noise=0.003)
    table["flops"] = 3.0 * table["params"] ** 1.1 * table["tokens"]  # FLOPs that are not 6·N·D
    fit = fit_parametric(read_runs(table))
    assert fit.flops_law.coefficient == pytest.approx(3.0) and fit.flops_law.exponent == pytest.approx(1.1)
    low, high = fit.optimum(1e20), fit.optimum(1e22)
    assert fit.a == pytest.approx(np.log(high.params / low.params) / np.log(100))
    assert fit.b == pytest.approx(np.log(high.tokens / low.tokens) / np.log(100))
    sizes = low.params * np.array([0.99, 1, 1.01])
    losses = fit.loss(sizes, 1e20 / (3.0 * sizes**1.1))
    assert losses[1] < losses[0] and losses[1] < losses[2]


@pytest.mark.parametrize(("name", "index"), [("E", 0), ("alpha", 3), ("beta", 4)])
def test_an_interval_ends_where_the_refitted_law_is_one_deviate_off(name: str, index: int):
    """Against the definition, with scipy's simplex refitting the other coefficients."""
    fit = fit_parametric(read_runs(isoflop_table(CHINCHILLA, noise=0.005, seed=3)), delta=1.0)
    law, theta = fit.estimate.law, fit.estimate.theta
    chosen = correlation(fit.estimate.covariance[np.ix_([0, 3, 4], [0, 3, 4])])
    deviate = critical_value(chosen, len(fit.runs) - 5, 0.95)
    assert stats.t.ppf(0.975, 37) < deviate < stats.t.ppf(1 - 0.025 / 3, 37)  # between one and Bonferroni's three
    others = [i for i in range(5) if i != index]
    for end in fit.intervals[name]:

        def objective(rest: np.ndarray, end: float = end) -> float:
            moved = theta.copy()
            moved[others], moved[index] = rest, end
            return float(law.objective(moved[None])[0])

        options = {"xatol": 1e-9, "fatol": 1e-14, "maxiter": 4000, "maxfev": 4000}
        refitted = minimize(objective, theta[others], method="Nelder-Mead", options=options)
        excess = 2 * (refitted.fun - fit.objective) / curvature_scale(fit.noise, 1.0)
        assert np.sqrt(excess) == pytest.approx(deviate, rel=1e-2)  # ends are found to 0.5%


@pytest.mark.slow
def test_the_interval_of_the_optimum_agrees_with_a_bootstrap():
    runs = read_runs(isoflop_table(CHINCHILLA, noise=0.003, seed=8, budgets=9, sizes=9))
    fit = fit_parametric(runs)
    best, sizes, losses = fit.optimum(1e22), [], []
    for seed in range(60):
        drawn = isoflop_table(fit_truth(fit), noise=fit.noise, seed=100 + seed, budgets=9, sizes=9)
        again = fit_parametric(read_runs(drawn)).optimum(1e22)
        sizes.append(np.log(again.params))
        losses.append(np.log(again.loss))
    low, high = np.log(best.intervals["params"])
    assert high - low == pytest.approx(2 * 1.99 * np.std(sizes), rel=0.3)  # 60 draws know a spread to 10%
    low, high = np.log(best.intervals["loss"])
    assert high - low == pytest.approx(2 * 1.99 * np.hypot(np.std(losses), fit.noise), rel=0.3)


def fit_truth(fit) -> dict[str, float]:
    return {name: getattr(fit, name) for name in CHINCHILLA}


def test_bootstrap_is_seeded_and_near_the_profile():
    runs = read_runs(isoflop_table(CHINCHILLA, noise=0.003, seed=9, budgets=9, sizes=9))
    first, again, other = (fit_parametric(runs, intervals="bootstrap", samples=300, seed=s) for s in (1, 1, 2))
    assert first.intervals == again.intervals != other.intervals
    profile = fit_parametric(runs)
    for name in ("E", "alpha", "beta", "a"):
        widths = [np.diff(fit.intervals[name])[0] for fit in (first, profile)]
        assert 0.5 < widths[0] / widths[1] < 1.1


def test_an_end_found_from_inside_bounds_the_interval():
    fit = fit_parametric(read_runs(isoflop_table(CHINCHILLA, noise=0.003)))
    for flops in np.geomspace(5e18, 7e18, 8):
        low, high = fit.optimum(flops).intervals["params"]
        assert 0.9 < low / fit.optimum(flops).params < 1 < high / fit.optimum(flops).params < 1.1


def test_e_stops_at_zero():
    truth = CHINCHILLA | {"E": 0.0}
    fits = [fit_parametric(read_runs(isoflop_table(truth, noise=0.01, seed=seed))) for seed in range(8)]
    assert any(fit.E == 0 for fit in fits) and any(fit.E > 0 for fit in fits)
    for fit in fits:
        assert fit.intervals["E"][0] == 0 and fit.intervals["E"][1] > fit.E
        assert any("weakly identified: E" in warning for warning in fit.warnings)


def test_a_narrow_table_is_weakly_identified():
    params = np.geomspace(1e8, 1.5e8, 12)
    fit = fit_parametric(read_runs(noisy(CHINCHILLA, params, np.tile([2e9, 2.5e9, 3e9], 4), 0.01, 0)))
    message = next(warning for warning in fit.warnings if "weakly identified" in warning)
    assert "alpha" in message and "condition number" in message


def test_a_best_size_beyond_those_tried_is_said():
    fit = fit_parametric(read_runs(isoflop_table(CHINCHILLA, noise=0.001, reach=2, shift=(5, 5))))
    assert any("lies beyond the sizes tried" in warning for warning in fit.warnings)


def test_five_rows_have_no_intervals_and_four_no_fit():
    table = grid_table(CHINCHILLA)
    few = {name: values[[0, 5, 14, 30, 35]] for name, values in table.items()}
    fit = fit_parametric(read_runs(few))
    assert fit.intervals["E"] == (0, np.inf) and "there are no intervals" in fit.warnings[0]
    assert fit.json()["intervals"]["E"] == [0, None]
    with pytest.raises(ConfigError, match="5 coefficients, and the table has 4 rows"):
        fit_parametric(read_runs({name: values[:4] for name, values in few.items()}))


def test_one_size_cannot_be_told_from_e():
    tokens = np.geomspace(1e9, 1e11, 8)
    with pytest.raises(ConfigError, match=r"every row has params = 1e\+08"):
        fit_parametric(read_runs(noisy(CHINCHILLA, np.full(8, 1e8), tokens, 0, 0)))


def test_the_count_of_parameters_is_the_columns():
    table = isoflop_table(CHINCHILLA)
    table["params_non_embedding"] = table["params"]
    table["params"] = table["params"] + 3e7
    fit = fit_parametric(read_runs(table, Columns(params="params_non_embedding")))
    assert fit.alpha == pytest.approx(0.34, rel=1e-8)
    assert abs(fit_parametric(read_runs(table)).alpha - 0.34) > 0.01


def test_a_long_table_is_fitted():
    random = np.random.default_rng(0)
    params, tokens = np.exp(random.uniform(16, 22, 3000)), np.exp(random.uniform(20, 26, 3000))
    fit = fit_parametric(read_runs(noisy(REPLICATED, params, tokens, 0.003, 1)))
    assert fit.alpha == pytest.approx(REPLICATED["alpha"], abs=0.01)
    assert fit.loss(1e9, 1e10) == pytest.approx(loss_of(REPLICATED, 1e9, 1e10), rel=1e-3)


@pytest.mark.parametrize("flops_power", [1.0, 1.2])
def test_quantities_have_the_gradients_they_say(flops_power: float):
    """Profile intervals find their ends even with poor gradients, only slowly: so nothing else would tell."""
    table = isoflop_table(CHINCHILLA, noise=0.003)
    table["flops"] = 6 * table["params"] ** flops_power * table["tokens"]
    fit = fit_parametric(read_runs(table))
    quantities = [_log_size(fit, 1e22), _log_loss(fit, 1e22), _size_exponent(flops_power)]
    best = fit.optimum(1e22)
    theta = fit.estimate.theta[None]
    for quantity, expected in zip(quantities, (np.log(best.params), np.log(best.loss), fit.a), strict=True):
        value, gradient = quantity(theta)
        assert value[0] == pytest.approx(expected, rel=1e-9)
        for i in range(5):
            step = np.zeros((1, 5))
            step[0, i] = 1e-5
            difference = (quantity(theta + step)[0] - quantity(theta - step)[0]) / 2e-5
            assert gradient[0, i] == pytest.approx(difference[0], rel=1e-5, abs=1e-7)  # error of 1e-5 squared
