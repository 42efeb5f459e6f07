"""The largest numbers of rows against a stable sort: the same numbers in the same places, where they tie too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.kernels.largest import GROUP, largest, likeliest


@pytest.mark.parametrize("kinds", [3, 1000, None], ids=str)
@pytest.mark.parametrize(("columns", "count"), [(1, 1), (300, 20), (4 * GROUP * 5 + 7, 5), (20_001, 20)])
def test_as_a_stable_sort(columns: int, count: int, kinds: int | None) -> None:
    """Few kinds of numbers tie all the time; infinities among them."""
    draw = np.random.default_rng(columns)
    x = draw.normal(size=(3, columns)) if kinds is None else draw.integers(kinds, size=(3, columns))
    x = x.astype(np.float32)
    x[0, 1:] = np.where(draw.random(columns - 1) < 0.9, -np.inf, x[0, 1:])
    x[2] = -np.inf
    values, places = jax.jit(largest, static_argnums=1)(jnp.asarray(x), count)
    right = np.argsort(-x, axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(places, right)
    np.testing.assert_array_equal(values, np.take_along_axis(x, right, axis=-1))


@pytest.mark.parametrize("columns", [1, 300, 4 * GROUP + 7, 20_001])
def test_the_likeliest_is_that_of_argmax(columns: int) -> None:
    """Ties, and rows of infinities."""
    draw = np.random.default_rng(columns)
    x = draw.integers(3, size=(4, columns)).astype(np.float32)
    x[1], x[2] = draw.normal(size=columns), -np.inf
    np.testing.assert_array_equal(jax.jit(likeliest)(jnp.asarray(x)), np.argmax(x, axis=-1))
