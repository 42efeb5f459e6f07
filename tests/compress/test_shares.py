"""Shares of zeros that differ between matrices: by patterns, and by outliers (OWL)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.compress import compress_model
from cramjax.compress.shares import owl_shares, spread, with_share
from cramjax.compress.walk import BlockWalk
from cramjax.compress.watch import watched_block
from cramjax.compression import CompressConfig, resolved
from cramjax.errors import ConfigError
from cramjax.language_model import LanguageModel

MakeModel = Callable[..., LanguageModel]


def test_the_first_pattern_counts() -> None:
    config = resolved(CompressConfig(method="magnitude", shares={"0/*": 0.1, "*/mlp/*": 0.7}))
    found = [with_share(config, repeat, name, None).sparsity for repeat in (0, 1) for name in ("mlp/up", "out")]
    assert found == [0.1, 0.1, 0.7, 0.5]
    assert with_share(config, 1, "mlp/up", [0.2, 0.3]).sparsity == 0.3


@pytest.mark.parametrize("method", ["magnitude", pytest.param("sparsegpt", marks=pytest.mark.slow)])
def test_matrices_have_the_shares_of_their_patterns(
    model_of: MakeModel, text: str, tmp_path: Path, method: Any
) -> None:
    shares = {"1/attention/*": 0.0, "*/mlp/down/kernel": 0.25}
    data = {"data": text, "sequences": 4, "sequence_length": 16} if method == "sparsegpt" else {}
    made = compress_model(model_of(layers=2), CompressConfig(method=method, shares=shares, **data), tmp_path / "model")
    for matrix in made.matrices:
        wanted = 0.25 if "down" in matrix.name else 0.0 if matrix.block == 1 and "attention" in matrix.name else 0.5
        assert matrix.zeros == pytest.approx(wanted, abs=2e-3), (matrix.block, matrix.name)
        assert wanted or matrix.error == 0
    assert made.json()["options"]["shares"] == shares


def test_shares_are_spread_around_the_mean() -> None:
    """The published code: 2λ · (D - min) / (max - min), less its mean, is kept beside 1 - S."""
    outliers = np.asarray([0.01, 0.04, 0.02])
    kept = 0.16 * np.asarray([0, 1, 1 / 3])
    np.testing.assert_allclose(spread(outliers, 0.7), 1 - (0.3 + kept - kept.mean()), rtol=1e-12)
    np.testing.assert_array_equal(spread(np.full(3, 0.2), 0.5), [0.5] * 3)
    extreme = spread(outliers, 0.02)
    assert extreme.mean() == pytest.approx(0.02) and (extreme > 0).all()


@pytest.mark.slow
def test_blocks_with_more_outliers_keep_more(model_of: MakeModel, text: str, tmp_path: Path) -> None:
    model = model_of(layers=3)
    up = model.params["blocks"]["mlp"]["up"]
    up["kernel"] = up["kernel"].at[1, ::11, ::7].multiply(30.0)
    tokens = np.random.default_rng(0).integers(3, 290, (4, 16)).astype(np.int32)
    walk = BlockWalk(model.model, jax.devices()[0])
    told: list[int] = []
    blocks = jax.tree.map(np.asarray, model.params["blocks"])
    found = owl_shares(walk, blocks, walk.begin(model.params, tokens, 2), 0.5, told.append)
    assert told == [0, 1, 2] and np.mean(found) == pytest.approx(0.5) and np.ptp(found) == pytest.approx(0.16)
    # The definition, in NumPy, from the inputs of the whole model.
    x, context = model.model.embed(model.params, jnp.asarray(tokens))
    ratios = []
    for repeat in range(3):
        block = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], model.params["blocks"])
        x, seen = watched_block(model.model, block, x, context, repeat, {})
        scores = []
        for name, own in seen.items():
            kernel = block
            for key in name.split("/"):
                kernel = kernel[key]
            length = np.sqrt((np.asarray(own.rows, float) ** 2).mean(0))
            scores.append((np.abs(np.asarray(kernel, float)) * length[:, None]).reshape(-1))
        whole = np.concatenate(scores)
        ratios.append((whole > 5 * whole.mean()).mean())
    assert np.argmax(ratios) == 1 and found[1] == min(found)
    np.testing.assert_allclose(found, spread(np.asarray(ratios), 0.5), atol=2e-3)
    options: dict[str, Any] = {"data": text, "sequences": 4, "sequence_length": 16}
    made = compress_model(model, CompressConfig(method="wanda", shares="owl", **options), tmp_path / "model")
    zeros = [np.mean([matrix.zeros for matrix in made.matrices if matrix.block == block]) for block in range(3)]
    assert zeros[1] < min(zeros[0], zeros[2]) and np.mean(zeros) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rtn", "shares": {"*": 0.5}}, "shares is of methods that set weights to 0"),
        ({"method": "wanda", "pattern": "2:4", "shares": {"*": 0.5}}, "pattern is of all matrices, and shares of some"),
        ({"method": "magnitude", "shares": {"*": 1.0}}, r"shares are from 0 to below 1, got 1.0 for '\*'"),
        (
            {"method": "magnitude", "shares": {"9/*": 0.5}},
            "'9/.*' is the name of no matrix; they are 0/attention/",
        ),
        ({"method": "magnitude", "shares": "owl"}, "shares=owl needs text"),
    ],
)
def test_what_cannot_be_is_one_message(
    model_of: MakeModel, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    data = {"data": "text"} if options["method"] == "wanda" else {}
    with pytest.raises(ConfigError, match=message):
        compress_model(model_of(), CompressConfig(**data, **options), tmp_path / "model")
    assert not list(tmp_path.iterdir())
