"""The walk over one packed buffer: each text as if it stood alone, in products of real tokens only."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.model import Model
from cramjax.model.ragged import Ragged, ragged

from .small import CONFIGS, LENGTH, SEPARATOR, VOCAB, build, trained_like
from .test_virtual import made

LENGTHS = (7, LENGTH, 1, 5, 10)
SHAPES = {"packed": (40, 6, LENGTH), "padded": (6 * LENGTH, 6, LENGTH)}


def texts_of() -> list[list[int]]:
    """Texts with separators among their tokens."""
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, VOCAB, length).tolist() for length in LENGTHS]
    texts[1][4] = SEPARATOR
    return texts


def types_of() -> list[list[int]]:
    return [[place % 2 for place in range(length)] for length in LENGTHS]


def in_texts(batch: Ragged, stream: jax.Array) -> list[np.ndarray]:
    spans = zip(batch.starts[: len(LENGTHS)], LENGTHS, strict=True)
    return [np.asarray(stream[start : start + length]) for start, length in spans]


@pytest.fixture(scope="module", params=CONFIGS)
def model_and_streams(request: pytest.FixtureRequest) -> tuple[Model, Any, list[np.ndarray]]:
    """A model, and what it makes of the texts as padded rows with a mask."""
    model = build(request.param)
    params = trained_like(model)
    rows, there = np.zeros((2, len(LENGTHS), LENGTH), np.int32), np.arange(LENGTH) < np.array(LENGTHS)[:, None]
    for part, values in zip(rows, (texts_of(), types_of()), strict=True):
        part[there] = np.concatenate(values)
    types = jnp.asarray(rows[1]) if model.typed else None
    stream = jax.jit(model.stream)(params, jnp.asarray(rows[0]), kv_mask=jnp.asarray(there), token_types=types)
    return model, params, [np.asarray(row[:length]) for row, length in zip(stream, LENGTHS, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_text_is_as_in_a_padded_batch(model_and_streams: tuple[Model, Any, list[np.ndarray]], shape: str) -> None:
    model, params, streams = model_and_streams
    places, rows, longest = SHAPES[shape]
    types = types_of() if model.typed else None
    batch = ragged(texts_of(), places=places, rows=rows, longest=longest, types=types)
    assert batch.is_padded == (shape == "padded")
    for found, expected in zip(in_texts(batch, jax.jit(model.unpadded)(params, batch)), streams, strict=True):
        # Float32 sums in another order, of a stream of a few units.
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_stand_before_every_text(kind: str) -> None:
    model, params = made(kind, "rotary")
    texts = [[token % 39 + 1 for token in text] for text in texts_of()]
    batch = ragged(texts, places=40, rows=6, longest=LENGTH)
    stream = jax.jit(model.unpadded)(params, batch)
    rows = np.array([[*text, *[1] * (LENGTH - len(text))] for text in texts], np.int32)
    alone = jax.jit(model.stream)(params, jnp.asarray(rows))  # causal: what comes after is not seen
    for found, row in zip(in_texts(batch, stream), alone, strict=True):
        expected = row[: len(found)]
        np.testing.assert_allclose(found, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_buffer_are_each_others_inverse(shape: str) -> None:
    places, rows, longest = SHAPES[shape]
    texts = texts_of()
    batch = ragged(texts, places=places, rows=rows, longest=longest)
    apart = np.asarray(batch.apart(jnp.asarray(batch.tokens)))
    assert [row[:length].tolist() for row, length in zip(apart, LENGTHS, strict=False)] == texts
    assert np.asarray(batch.real).sum(axis=1).tolist() == [*LENGTHS, 0]
    there = np.concatenate([np.arange(start, start + n) for start, n in zip(batch.starts, LENGTHS, strict=False)])
    back = np.asarray(batch.joined(jnp.asarray(apart)))
    np.testing.assert_array_equal(back[there], np.asarray(batch.tokens)[there])
    assert np.asarray(batch.positions)[there].tolist() == [place for length in LENGTHS for place in range(length)]


@pytest.mark.parametrize("shape", [(34, 6, LENGTH), (40, 4, LENGTH), (40, 6, LENGTH - 1)])
def test_texts_that_do_not_fit_are_refused(shape: tuple[int, int, int]) -> None:
    places, rows, longest = shape
    with pytest.raises(ValueError, match="5 texts of 35 tokens, 12 the longest, do not fit"):
        ragged(texts_of(), places=places, rows=rows, longest=longest)
