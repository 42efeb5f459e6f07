"""Plans of compressions: bytes against what is made, memory against its definition, and the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cramjax import cli
from cramjax.compress import compress_model, plan_compression
from cramjax.compress import plan as planning
from cramjax.compress import rates as rates_of
from cramjax.compress.rates import Rates, forward_flops, measured_rates
from cramjax.compression import CompressConfig
from cramjax.language_model import LanguageModel

MakeModel = Callable[..., LanguageModel]
RATES = Rates(forward=2e9, hessians=4e9, factors=1e9, corrections=1e9, steps=1e6)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine that is not measured."""
    monkeypatch.setattr(planning, "measured_rates", lambda *given: RATES)


@pytest.mark.usefixtures("rates")
@pytest.mark.parametrize(
    "options",
    [
        {"method": "rtn", "bits": 4, "group": 16},
        {"method": "rtn", "bits": 3, "symmetric": False, "group": None, "only": "mlp/*"},
        {"method": "magnitude", "pattern": "2:4"},
        {"method": "rtn", "bits": 8, "group": 16, "rotate": True},
    ],
    ids=str,
)
def test_bytes_are_those_of_what_is_made(model_of: MakeModel, tmp_path: Path, options: dict[str, Any]) -> None:
    model = model_of(norm="rmsnorm")
    model.save(tmp_path / "model")
    config = CompressConfig(**options)
    planned = plan_compression(tmp_path / "model", config)
    made = compress_model(model, config, tmp_path / "out")
    assert planned.before == made.total.before and planned.parameters == made.total.parameters
    assert planned.after == pytest.approx(made.total.after, rel=1e-3)  # zeros are half of the weights, about
    assert planned.tokens == 0 and planned.host_bytes["inputs"] == 0


@pytest.mark.usefixtures("rates")
def test_a_model_that_is_not_there_is_planned_from_its_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    words = ["plan", "llama-7b", "--compress", "w4", "--sequences=4", "--sequence_length=1024", f"--json={out}"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "32 blocks" in printed and "bits per parameter" in printed
    plan = json.loads(out.read_text(encoding="utf-8"))
    width, mlp, tokens = 4096, 11008, 4096
    matrices = [(width, 3 * width), (width, width), (width, 2 * mlp), (mlp, width)]
    weights = sum(inner * outer for inner, outer in matrices)
    assert plan["device_bytes"]["block"] == 2 * (weights + 2 * width)  # and two norms, in bfloat16
    assert plan["device_bytes"]["Hessian"] == 4 * mlp**2
    assert sum(plan["device_bytes"].values()) < 2 * weights + 4 * 4 * mlp**2
    item = plan["host_bytes"]["streams"] / (2 * tokens * width)
    assert item in (2, 4)
    # The most that is held of inputs: those of `out`, and of `down` in the place of those of `up`.
    assert plan["host_bytes"]["inputs"] == item * tokens * (width + mlp)
    seconds = plan["seconds_of_a_block"]
    assert plan["seconds"] == pytest.approx(32 * sum(seconds.values()))
    pairs = (1024 + 1) / 2
    forward = 2 * weights + 4 * pairs * width + 2 * width * width  # `out` is computed twice
    assert seconds["forward"] == pytest.approx(tokens * forward / RATES.forward, rel=1e-3)
    upper = 2 * tokens * (3 * width**2 + mlp**2) * 5 / 9
    assert seconds["Hessians"] == pytest.approx(upper / RATES.hessians, rel=1e-3)
    codes = 32 * weights * (4 + 16 / 64) / 8
    assert plan["bytes_after"] == pytest.approx(codes + plan["bytes_before"] - 32 * 2 * weights, rel=1e-6)


@pytest.mark.usefixtures("rates")
def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--compress", "w4"], "cramjax plan --compress needs a model and a method"),
        (["llama-7b", "--compress"], "cramjax plan --compress needs a model and a method"),
        (["llama-7b", "--compress", "w44"], "did you mean w4?"),
        (["llama-77b", "--compress", "w4"], "llama-7b"),
        (["llama-7b", "--compress", "w4", "--group=100"], "A group must divide the 4096 inputs"),
        (["llama-7b", "--compress", "w4", "--only=mlpp/*"], "is the name of no matrix"),
        (["llama-7b", "--compress", "w4", "--sequence_length=4096"], "at most the model's context 1024, got 4096"),
    ):
        assert cli.main(["plan", *words]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1


@pytest.mark.slow
def test_rates_are_measured_once(model_of: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRAMJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(rates_of, "undisturbed", lambda measure: (measure(), True))  # whatever else runs here
    stack = model_of().model
    first = measured_rates(stack, 64, 32, jax.devices()[0])
    assert all(rate > 0 for rate in vars(first).values())
    assert measured_rates(stack, 64, 32, jax.devices()[0]) == first
    matrices = sum(
        np.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(stack.abstract_params()["blocks"]) if leaf.ndim == 3
    )
    assert forward_flops(stack, 32) == pytest.approx(2 * matrices + 4 * 32 * (32 + 1) / 2)
