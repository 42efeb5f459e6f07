"""The table of latencies: exact where it was measured, else between its entries; measured when it pays, and kept."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cramjax.language_model import LanguageModel
from cramjax.serve.lengths import costs
from cramjax.serve.lengths.costs import MEASURING_PAYS, Costs, Table, costs_of, estimated_costs
from cramjax.serve.lengths.shapes import Shape
from cramjax.training import Run

BARE = Costs(512, 2e7, 2e4)
TABLE = Table((32, 128, 512), (1, 4, 16), ((0.01, 0.02, 0.05), (0.02, 0.06, 0.2), (0.05, 0.3, None)))
MEASURED = replace(BARE, table=TABLE)


def padded(length: int, texts: int) -> Shape:
    return Shape(length * texts, texts, length)


def share(shape: Shape) -> float:
    return float(MEASURED.of_shape(shape) / BARE.of_shape(shape))


def test_entries_are_what_was_measured():
    for (n, length), (m, texts) in itertools.product(enumerate(TABLE.lengths), enumerate(TABLE.texts)):
        if (expected := TABLE.seconds[n][m]) is not None:
            assert float(MEASURED.of_shape(padded(length, texts))) == pytest.approx(expected)


def test_between_entries_it_is_between_them_and_beyond_as_at_the_edge():
    corners = [share(padded(length, texts)) for length in (32, 128) for texts in (4, 16)]
    assert share(padded(64, 8)) == pytest.approx(np.mean(corners))  # the middle of logarithms
    assert share(padded(8, 64)) == pytest.approx(share(padded(32, 16)))
    assert share(padded(512, 16)) == pytest.approx(share(padded(512, 4)))  # too large to be measured: as its neighbour


def test_fewer_places_cost_less_in_proportion():
    whole, part = padded(128, 16), Shape(1024, 16, 128)
    assert MEASURED.of_shape(part) / MEASURED.of_shape(whole) == pytest.approx(
        BARE.of_shape(part) / BARE.of_shape(whole)
    )


def test_seconds_of_arrays_are_those_of_each():
    longest, texts, tokens = np.array([20, 500, 90]), np.array([3, 2, 40]), np.array([50, 900, 3000])
    whole = MEASURED.seconds(longest, texts, tokens)
    each = [float(MEASURED.seconds(*map(np.asarray, one))) for one in zip(longest, texts, tokens, strict=True)]
    np.testing.assert_allclose(whole, each)
    assert np.isinf(MEASURED.seconds(np.asarray(500), np.asarray(100), np.asarray(50_000)))
    assert np.isfinite(MEASURED.seconds(np.asarray(50_000), np.asarray(1), np.asarray(50_000)))


@pytest.fixture
def model(run_of: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setenv("CRAMJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(costs, "_LENGTHS", (4, 64))
    monkeypatch.setattr(costs, "_TEXTS", (1, 2))
    return run_of("masked").language_model


def test_it_is_measured_once_and_when_it_pays(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert costs_of(model, MEASURING_PAYS - 1) == estimated_costs(model)
    measured = costs.undisturbed
    monkeypatch.setattr(costs, "undisturbed", lambda work: (measured(work)[0], False))
    assert costs_of(model, MEASURING_PAYS) == estimated_costs(model) and not list(tmp_path.glob("batch_costs/*"))
    monkeypatch.setattr(costs, "undisturbed", lambda work: (measured(work)[0], True))
    found = costs_of(model, MEASURING_PAYS).table
    assert found is not None and found.lengths == (4, 16) and found.texts == (1, 2)  # a context of 16
    (short, two_short), (long, two_long) = found.seconds
    assert 0 < short <= min(two_short, long) <= max(two_short, long) <= two_long < 60  # pyright: ignore
    monkeypatch.setattr(costs, "measure", lambda _: pytest.fail("it was measured"))
    assert costs_of(model).table == costs_of(model, MEASURING_PAYS).table == found
    other = {"float32": "bfloat16", "bfloat16": "float32"}[model.model.compute_dtype]
    assert costs_of(replace(model, model=replace(model.model, compute_dtype=other))).table is None
    (file,) = tmp_path.glob("batch_costs/*.json")
    for damaged in ("{", '{"lengths": [4], "texts": [1], "seconds": [[null]]}', '{"lengths": 4}', "[]"):
        file.write_text(damaged, encoding="utf-8")
        assert costs_of(model).table is None
