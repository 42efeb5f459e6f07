"""Attention over pages against its definition in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.kernels.attention.pages import attend_pages, refusal

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"the kernel cannot run here: {refusal()}")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "options"),
    [(6, 2, 19, {}), (4, 4, 32, {"window": 5}), (3, 1, 40, {"scale": 0.7, "softcap": 2.0})],
)
def test_pages(heads: int, kv_heads: int, width: int, options: dict):
    """Texts of no, one and many tokens, whose last one is new; tables that share a page; scores far apart."""
    rng, pages, places = np.random.default_rng(0), 9, 7
    lengths, table = np.array([0, 1, 7, 23, 40]), rng.integers(0, pages, (5, 6))
    q = 5 * rng.normal(size=(5, heads, width)).astype(np.float32)
    keys, values = rng.normal(size=(2, pages, places, kv_heads, width)).astype(np.float32)
    k, v = rng.normal(size=(2, 5, kv_heads, width)).astype(np.float32)
    got, *held = attend_pages(*map(jnp.asarray, (q, k, v, keys, values, table, lengths)), **options)
    for row, length in enumerate(lengths):
        if length:
            at = table[row, (length - 1) // places], (length - 1) % places
            keys[at], values[at] = k[row], v[row]
    np.testing.assert_array_equal(held[0], keys)
    np.testing.assert_array_equal(held[1], values)
    scale, cap = options.get("scale", width**-0.5), options.get("softcap")
    for row, length in enumerate(lengths):
        start = max(0, length - options.get("window", length))
        k, v = (
            pool[table[row]].reshape(-1, kv_heads, width)[start:length].astype(np.float64) for pool in (keys, values)
        )
        for head in range(heads):
            scores = scale * k[:, head * kv_heads // heads] @ q[row, head].astype(np.float64)
            scores = scores if cap is None else cap * np.tanh(scores / cap)
            weights = np.exp(scores - scores.max(initial=-np.inf)) if length else scores
            exact = weights @ v[:, head * kv_heads // heads] / (weights.sum() or 1)
            # Scores of up to some tens are rounded in float32, and their error is one of the exponential's factor.
            np.testing.assert_allclose(got[row, head], exact, atol=3e-5)
