"""Experts compressed by the tokens that each is sent, to ternary words as QMoE does it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cramjax.compress import compress_model
from cramjax.compress.walk import BlockWalk
from cramjax.compression import CompressConfig
from cramjax.errors import ConfigError
from cramjax.evaluation import evaluate_text
from cramjax.experts import ExpertsConfig
from cramjax.kernels.packed import Coded, Quantised, unpacked
from cramjax.language_model import LanguageModel, load_model
from cramjax.serve import generate
from cramjax.start import start

MakeModel = Callable[..., LanguageModel]
UP = "experts/up/kernel"


def hessians(model: LanguageModel, **options: Any) -> dict[str, np.ndarray]:
    """What matrices of the first block are calibrated on."""
    walk = BlockWalk(model.model, start()[0], **options)
    tokens = np.random.default_rng(0).integers(3, 290, (4, 16)).astype(np.int32)
    calibration = walk.begin(model.params, tokens, 2)
    found: dict[str, np.ndarray] = {}

    def visit(name: str, w: Any, hessian: Any) -> Any:
        found[name] = np.asarray(hessian)
        return np.asarray(w), w

    block = jax.tree.map(lambda leaf: np.asarray(leaf[0]), model.params["blocks"])
    walk.visit(block, 0, calibration, visit)
    return found


@pytest.mark.parametrize("sequential", [True, False])
def test_each_expert_is_calibrated_on_what_it_is_sent(model_of: MakeModel, sequential: bool) -> None:
    options = {"sequential": sequential, "only": "experts/*"}
    of_all = hessians(model_of(experts=ExpertsConfig(number=3, active=3, width=32)), **options)
    assert list(of_all) == [UP, "experts/down/kernel"]
    # All tokens go to all experts, so they see the same; and of one expert each, the three see it together.
    for other in of_all[UP][1:]:
        np.testing.assert_allclose(other, of_all[UP][0], rtol=1e-4, atol=1e-6)
    of_one = hessians(model_of(experts=ExpertsConfig(number=3, active=1, width=32)), **options)
    np.testing.assert_allclose(of_one[UP].sum(0), of_all[UP][0], rtol=1e-4, atol=1e-5)
    assert all(np.trace(one) < 0.99 * np.trace(of_all[UP][0]) for one in of_one[UP])


@pytest.mark.slow
def test_ternary_experts_are_used_like_any_others(
    model_of: MakeModel, text: str, held_out: str, tmp_path: Path
) -> None:
    model = model_of(experts=ExpertsConfig(number=4, active=2, shared=1, width=32, every=3))
    options = {
        "sequences": 12,
        "sequence_length": 24,
        "batch": 6,
        "damp": 0.1,
        "only": "*experts/[!s]*",
        "text": held_out,
    }
    made = {
        method: compress_model(
            model, CompressConfig(method=method, bits="ternary", data=text, **options), tmp_path / method
        )
        for method in ("rtn", "gptq")
    }
    errors = {
        method: np.mean([matrix.error for matrix in found.matrices if matrix.name.endswith("up/kernel")])
        for method, found in made.items()
    }
    assert errors["gptq"] < 0.9 * errors["rtn"]
    assert {matrix.shape for matrix in made["gptq"].matrices} == {(4, 32, 64), (4, 32, 32)}
    read = load_model(made["gptq"].out)
    blocks = read.params["blocks"]
    assert isinstance(blocks["2"]["experts"]["up"]["kernel"], Coded)
    assert not isinstance(blocks["0"]["mlp"]["up"]["kernel"], Coded)
    # The same as with the weights that the words stand for.
    params = jax.tree.map(lambda leaf: unpacked(leaf), read.params, is_leaf=lambda leaf: isinstance(leaf, Coded))
    dense = LanguageModel("dense", "causal", read.tokenizer, read.context, read.model, params)
    scores = [evaluate_text(each, held_out).bits_per_byte for each in (read, dense)]  # pyright: ignore
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert made["gptq"].bits_per_byte is not None and made["gptq"].bits_per_byte[1] == pytest.approx(
        scores[0], rel=1e-4
    )
    texts = [generate(each, "the", max_tokens=8, temperature=0.0)[0].text for each in (read, dense)]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_experts_that_are_sent_nothing_are_rounded_and_said(model_of: MakeModel, text: str, tmp_path: Path) -> None:
    model = model_of(experts=ExpertsConfig(number=32, active=1, width=16))
    options = {"sequences": 1, "sequence_length": 16, "group": 16, "only": "experts/*"}
    found = compress_model(model, CompressConfig(bits=4, data=text, **options), tmp_path / "a")
    unseen = sum(matrix.unseen for matrix in found.matrices)
    assert unseen >= 3 * 2 * 16 and any(
        f"{unseen} of 192 experts' matrices were sent nothing" in n for n in found.notes
    )
    leaf = load_model(found.out).params["blocks"]["experts"]["up"]["kernel"]
    assert isinstance(leaf, Quantised) and leaf.shape == (3, 32, 32, 32)
    assert np.isfinite(unpacked(leaf)).all()


def test_a_pattern_must_name_a_matrix(model_of: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names experts, and this model has none"):
        compress_model(model_of(), CompressConfig(method="rtn", only="experts/*"), tmp_path / "a")
    with pytest.raises(ConfigError, match="is the name of no matrix of a block; they are attention/"):
        compress_model(model_of(), CompressConfig(method="rtn", only="heads/*"), tmp_path / "a")
