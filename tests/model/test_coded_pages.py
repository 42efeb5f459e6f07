"""Keys and values in codes against their definition in NumPy, and a query's attention against what it is to see."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.model.cache import Places
from cramjax.model.coded_pages import CodedPages, coded_keys, coded_values

SIZE, HEADS, KV_HEADS, WIDTH = 8, 4, 2, 16


def by_definition(x: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Numbers in 2^bits even steps from the smallest to the largest along an axis; both ends in 16 bits."""
    low = x.min(axis, keepdims=True).astype(np.float16).astype(np.float32)
    step = ((x.max(axis, keepdims=True) - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint((x - low) / np.where(step > 0, step, 1)), 0, 2**bits - 1)
    return codes * step + low


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_are_those_of_the_definition(bits: int) -> None:
    """A page of keys channel by channel, though some are far from 0; values token by token, some all alike."""
    draw = np.random.default_rng(bits)
    keys = draw.normal(size=(3, SIZE, KV_HEADS, WIDTH)).astype(np.float32) + 20 * (np.arange(WIDTH) % 5 == 0)
    values = draw.normal(size=(3, SIZE, KV_HEADS, WIDTH)).astype(np.float32)
    values[1, 2] = 0.25
    for x, of, axis in ((keys, coded_keys, 1), (values, coded_values, -1)):
        held = jax.jit(of, static_argnums=1)(x, bits)
        assert held.shape == x.shape and held.codes.nbytes == x.size * bits // 8
        np.testing.assert_allclose(
            held.numbers("float32"), by_definition(x, bits, axis), rtol=0, atol=1e-6 * np.abs(x).max()
        )
        reach = x.max(axis, keepdims=True) - x.min(axis, keepdims=True)
        # Half a step, and what 16 bits lose of both ends.
        allowed = reach / (2**bits - 1) / 2 + 2**-10 * (np.abs(x).max(axis, keepdims=True) + reach)
        assert np.all(np.abs(np.asarray(held.numbers("float32")) - x) <= allowed)


def empty(rows: int, pages: int, guesses: int, bits: int) -> CodedPages:
    """Rows with tables of pages of their own, in mixed order, in slots in mixed order."""
    each = (pages - 1) // rows
    made = CodedPages.made((1, pages, SIZE, KV_HEADS, WIDTH), rows + 1, SIZE + guesses, "float32", bits)
    table = np.random.default_rng(0).permutation(np.arange(1, 1 + rows * each)).reshape(rows, each)
    return replace(made, table=jnp.asarray(table), slots=jnp.arange(rows)[::-1])


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None, softcap: float | None) -> np.ndarray:
    """What the newest token's query gives of all keys, or those of a window, in float64."""
    k, v = (np.repeat(x.astype(float)[-(window or len(x)) :], HEADS // KV_HEADS, axis=1) for x in (k, v))
    scores = np.einsum("hd,nhd->hn", q, k) * WIDTH**-0.5
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return np.einsum("hn,nhd->hd", weights / weights.sum(1, keepdims=True), v)


def seen_by(x: np.ndarray, place: int, bits: int, axis: int) -> np.ndarray:
    """What the token at a place sees of keys or values (tokens, …) up to it: pages before its own rounded."""
    whole = place // SIZE * SIZE
    pages = x[:whole].reshape(-1, SIZE, *x.shape[1:])
    return np.concatenate([by_definition(pages, bits, axis).reshape(whole, *x.shape[1:]), x[whole : place + 1]])


@pytest.mark.parametrize(
    ("pieces", "bits", "options"),
    [
        ([((1, 1), 0)] * 40, 2, {}),  # a token at a time
        ([((40, 40), 0)], 8, {"window": 11, "softcap": 5.0}),
        ([((3, 0), 0), ((13, 9), 0), ((24, 8), 0), ((0, 23), 0)], 4, {}),  # rows of unequal lengths, and one that waits
        (
            [((5, 6), 0), ((1, 1), 4), ((1, 1), 4), ((1, 1), 4), ((32, 31), 0)],
            2,
            {"window": 11},
        ),  # guesses that are taken back, over a page
    ],
    ids=["tokens", "whole", "pieces", "guesses"],
)
def test_a_token_sees_pages_before_its_own_in_codes_and_its_own_in_full(pieces: list, bits: int, options: dict) -> None:
    """However the text was cut into calls."""
    draw, rows, count = np.random.default_rng(1), 2, 40
    q = draw.normal(size=(rows, count, HEADS, WIDTH)).astype(np.float32)
    k, v = (draw.normal(size=(rows, count, KV_HEADS, WIDTH)).astype(np.float32) for _ in range(2))
    k += 3 * (np.arange(WIDTH) % 3 == 0)
    cache, starts = empty(rows, 1 + 2 * 6, 4, bits), np.zeros(rows, int)
    own = {"window": None, "scale": None, "softcap": None} | options
    found = np.zeros_like(q)
    attend = jax.jit(lambda cache, *args: cache.attend(0, *args, **own))
    for counts, guesses in pieces:
        wide = max(counts) + guesses
        new = [np.array(draw.normal(size=(rows, wide, *x.shape[2:])), np.float32) for x in (q, k, v)]  # wrong guesses
        for row, number in enumerate(counts):
            for part, x in zip(new, (q, k, v), strict=True):
                part[row, :number] = x[row, starts[row] : starts[row] + number]
        real = np.arange(wide) < np.array(counts)[:, None] + guesses
        out, cache = attend(cache, *new, Places(jnp.asarray(starts, jnp.int32), jnp.asarray(real)))
        for row, number in enumerate(counts):
            found[row, starts[row] : starts[row] + number] = out[row, :number]
        starts += counts
    assert starts.tolist() == [count, count]
    for row in range(rows):
        for place in range(count):
            keys, values = seen_by(k[row], place, bits, 1), seen_by(v[row], place, bits, -1)
            right = attended(q[row, place], keys, values, own["window"], own["softcap"])
            np.testing.assert_allclose(found[row, place], right, atol=2e-5)
