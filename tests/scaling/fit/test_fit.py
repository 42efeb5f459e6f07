"""The whole way: `cramjax fit`, its files and figures, fits read back, and advice."""

import csv
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import cramjax
from cramjax import cli
from cramjax.errors import ConfigError, RunError
from cramjax.scaling import PowerLaws, ScalingFit, advise, fit_runs, read_fit
from tests.scaling.fit.tables import CHINCHILLA, OPTIMA, best_size, grid_table, isoflop_table, loss_of, needs_optima


def written(table: dict, path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(table)
        rows.writerows(zip(*table.values(), strict=True))
    return path


@pytest.fixture(scope="module")
def fit() -> ScalingFit:
    return fit_runs(isoflop_table(CHINCHILLA, noise=0.002, reach=5))


def test_fit_writes_json_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = written(isoflop_table(CHINCHILLA, noise=0.002, reach=5), tmp_path / "runs.csv")
    out, picture = tmp_path / "fit.json", tmp_path / "fit.png"
    assert cli.main(["fit", str(table), "--json", str(out), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))
    assert {"E", "A", "B", "alpha", "beta", "objective", "a", "b", "intervals", "isoflop", "warnings"} <= set(found)
    for name, value in CHINCHILLA.items():
        low, high = found["intervals"][name]
        assert low < value < high and low < found[name] < high
    low, high = found["intervals"]["a"]
    assert low < found["a"] < high and low < found["isoflop"]["a"] < high
    assert found["a"] + found["b"] == pytest.approx(1)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "N is column params, D tokens, L loss; FLOPs are 6·params·tokens" in printed
    assert re.search(r"^α +0\.3\d+ +0\.3\d+ … 0\.3\d+$", printed, re.MULTILINE)


def test_a_fit_is_read_back(fit: ScalingFit, tmp_path: Path):
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(fit.json(), allow_nan=False), encoding="utf-8")
    again = read_fit(path)
    assert again.json() == fit.json() and str(again) == str(fit)
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    for name, message in (("none.json", "cannot read .*none.json: No such file"), ("other.json", "holds no fit")):
        with pytest.raises(RunError, match=message):
            read_fit(tmp_path / name)


@needs_optima
def test_power_laws_through_optima(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, picture = tmp_path / "fit.json", tmp_path / "fit.svg"
    columns = ["--x=flops", "--y=n", "--std=n_star_std", "--by=dataset,hparams,warmup,decay,param_count,val"]
    files = ["--json", str(out), "--plot", str(picture)]
    assert cli.main(["fit", str(OPTIMA), "--method=power-law", *columns, *files]) == 0
    groups = json.loads(out.read_text(encoding="utf-8"))["groups"]
    assert [f"{group['exponent']:.4f}" for group in groups[:2]] == ["0.8353", "0.7065"]
    assert "0.8353" in capsys.readouterr().out
    ElementTree.fromstring(picture.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs.csv", "--loss", "bpb"], "runs.csv has no column bpb; it has params, tokens, loss"),
        (["few.csv"], "the law has 5 coefficients, and the table has 4 rows"),
        (["none.csv"], "cannot read none.csv: No such file or directory"),
        (["runs.csv", "--method", "isoflops"], "argument --method: invalid choice: 'isoflops'"),
        (["runs.csv", "--plot", "fit.gif"], "--plot must be a .png, .svg or .pdf file, got 'fit.gif'"),
        (["runs.csv", "--x", "flops"], "method auto has no option x. It has: params, tokens,"),
        (["runs.csv", "--method", "power-law", "--solver", "l-bfgs"], "method power-law has no option solver"),
        (["runs.csv", "--samples", "3"], "samples must be 100 or more"),
        (["runs.csv", "--delta", "-1"], "delta must be a positive number, got -1.0"),
        (["runs.csv", "--method", "isoflop"], "at least 2 budgets with 3 sizes or more"),
        ([], "the following arguments are required: TABLE"),
    ],
)
def test_mistakes_are_one_sentence(words, message, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    table = grid_table(CHINCHILLA)
    written(table, tmp_path / "runs.csv")
    written({name: values[:4] for name, values in table.items()}, tmp_path / "few.csv")
    assert cli.main(["fit", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.slow
def test_files_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = written(grid_table(CHINCHILLA), tmp_path / "runs.csv")
    for option in ("--json", "--plot"):
        assert cli.main(["fit", str(table), option, str(tmp_path / "none" / "out.png")]) == 2
        assert "cannot write" in capsys.readouterr().err


def test_the_notebook_function_takes_the_same_options():
    table = grid_table(CHINCHILLA, noise=0.001)
    fit = cramjax.fit_scaling(table, intervals="bootstrap", samples=200, seed=3)
    assert isinstance(fit, ScalingFit) and fit.isoflop is None and list(fit.fits) == ["parametric"]
    assert fit.settings.seed == 3 and fit.intervals["alpha"][0] < 0.34 < fit.intervals["alpha"][1]
    assert "<td>α</td>" in fit._repr_html_()
    laws = cramjax.fit_scaling(table, "power-law", x="tokens", y="params")
    assert isinstance(laws, PowerLaws)
    with pytest.raises(ConfigError, match="method must be auto, parametric, isoflop, envelope or power-law"):
        cramjax.fit_scaling(table, "best")
    with pytest.raises(ConfigError, match="solver must be variable-projection, l-bfgs, got 'newton'"):
        cramjax.fit_scaling(table, solver="newton")


@pytest.mark.slow
def test_figures_of_every_kind_of_fit(fit: ScalingFit):
    for shown, titles in (
        (
            fit,
            ["Loss at each budget", "Best size N*(C)", "Best tokens D*(C)", "The law, and its best path", "Residuals"],
        ),
        (cramjax.fit_scaling(fit.runs, "isoflop", samples=100), ["Loss at each budget", "Loss of the best L*(C)"]),
        (cramjax.fit_scaling(grid_table(CHINCHILLA)), ["Loss by size", "Residuals"]),
    ):
        svg = shown.plot()._repr_svg_()
        ElementTree.fromstring(svg)
        for title in titles:
            assert title in svg


def test_advice_is_the_optimum_of_the_law(fit: ScalingFit):
    advice = advise(fit, flops=3e21)
    assert advice.params == pytest.approx(best_size(CHINCHILLA, 3e21), rel=0.1)
    assert 6 * advice.params * advice.tokens == pytest.approx(3e21)
    truth = {"params": best_size(CHINCHILLA, 3e21)}
    truth["tokens"] = 3e21 / 6 / truth["params"]
    truth["loss"] = loss_of(CHINCHILLA, truth["params"], truth["tokens"])
    for name, value in truth.items():
        low, high = advice.intervals[name]
        assert low < value < high and low < getattr(advice, name) < high
    assert advice.source == "parametric" and advice.extrapolation == pytest.approx(3) and not advice.warnings
    assert advise(fit, seconds=3e6, flops_per_second=1e15).json() == advice.json()
    assert str(advice).startswith("3e+21 FLOPs, by the parametric fit")


def test_advice_warns_where_it_extrapolates_far(fit: ScalingFit):
    assert "extrapolates far: 100 times the table's largest" in advise(fit, flops=1e23).warnings[0]
    assert "extrapolates far: 100 times below" in advise(fit, flops=1e16).warnings[0]
    near, far = advise(fit, flops=1e21), advise(fit, flops=1e25)
    widths = [np.log(np.divide(*advice.intervals["params"][::-1])) for advice in (near, far)]
    assert widths[1] > 2 * widths[0]


def test_advice_without_the_law_is_from_power_laws(fit: ScalingFit):
    laws = cramjax.fit_scaling(fit.runs, "isoflop")
    assert isinstance(laws, ScalingFit)
    advice = advise(laws, flops=2e21)
    assert advice.source == "isoflop" and advice.params == pytest.approx(best_size(CHINCHILLA, 2e21), rel=0.1)
    assert any("has no floor" in warning for warning in advice.warnings)


@pytest.mark.parametrize(
    "budget", [{}, {"seconds": 1.0}, {"flops_per_second": 1.0}, {"flops": 1.0, "seconds": 1.0}, {"flops": -1.0}]
)
def test_advice_needs_one_budget(fit: ScalingFit, budget: dict[str, float]):
    with pytest.raises(ConfigError, match="budget"):
        advise(fit, **budget)
