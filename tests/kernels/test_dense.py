"""The dense product against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.kernels.dense import dense


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operands_are_rounded_and_sums_are_float32(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3, 2000)), rng.normal(size=(2000, 5))
    got = dense(jnp.float32(x), jnp.float32(w), dtype=dtype)
    rounded = [np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, w)]
    assert got.dtype == dtype
    # The result is rounded once (2^-8 relative in bfloat16); sums kept in bfloat16 would be off by whole units here.
    np.testing.assert_allclose(
        np.asarray(got, np.float64), rounded[0] @ rounded[1], rtol=4e-3 if dtype == "bfloat16" else 1e-5, atol=1e-3
    )
