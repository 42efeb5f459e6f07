"""Past the end of a table of positions, or of a cache, there is an error where lengths are known, and NaN where not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ConfigError

from .small import LENGTH, batch, build, trained_like


def test_a_sequence_longer_than_the_table_of_positions_is_refused() -> None:
    model = build("gpt2")
    params = trained_like(model)
    with pytest.raises(ConfigError, match="20 learned positions.*a sequence can have at most 20 tokens, got 21"):
        model.embed(params, batch(21))
    assert np.isfinite(model.embed(params, batch(20))[0]).all()


@pytest.mark.parametrize("name", ["gpt2", "crammed"])
def test_positions_that_are_not_there_give_nan(name: str) -> None:
    model = build(name)
    rows = model.sizes.positions
    x, _ = model.embed(trained_like(model), batch(3), positions=jnp.array([[0, rows - 1, rows]]))
    assert np.isfinite(x[:, :2]).all() and np.isnan(x[:, 2]).all()


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_a_full_cache_gives_nan_and_leaves_other_rows_alone(name: str) -> None:
    model = build(name, layer_loop="scan")
    params, tokens, decode = trained_like(model), batch(), jax.jit(model.decode)
    _, cache = decode(params, model.init_cache(2, LENGTH), tokens, jnp.array([LENGTH, 8]))
    hidden, cache = decode(params, cache, tokens[:, :2])
    assert np.isnan(hidden[0]).all() and np.isfinite(hidden[1]).all()
    # A row that is full and asks for nothing stays as it is.
    _, cache = decode(params, model.init_cache(2, LENGTH), tokens, jnp.array([LENGTH, 8]))
    hidden, _ = decode(params, cache, tokens[:, :1], jnp.array([0, 1]))
    assert np.isfinite(hidden).all()
    with pytest.raises(ConfigError, match="places for 4 tokens, got 12"):
        decode(params, model.init_cache(2, 4), tokens)
