"""The table of optimizers: each has its function, and keeps the state that the table says."""

import jax
import jax.numpy as jnp
import pytest

from cramjax.config import OptimConfig
from cramjax.optim import directions, make_fused, make_optimizer
from cramjax.optimizers import OPTIMIZERS

from .trees import declared

_ROWS, _COLUMNS, _LAYERS = 256, 384, 3
_TREE = {
    "blocks": {"mlp": {"up": {"kernel": jnp.zeros((_LAYERS, _ROWS, _COLUMNS))}}},
    "embed": {"token": {"table": jnp.zeros((512, 128))}},
    "head": {},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_has_a_function_of_its_name_unless_it_is_layerwise(name: str):
    assert hasattr(directions, name) is not OPTIMIZERS[name].layerwise


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_keeps_the_state_that_the_table_says(name: str):
    traits, config = OPTIMIZERS[name], OptimConfig(name=name)
    make = make_fused if traits.layerwise else make_optimizer
    state = jax.eval_shape(make(config, declared(_TREE)).init, _TREE)
    kept = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32)
    matrices, table = _LAYERS * _ROWS * _COLUMNS, 512 * 128
    if traits.factored:
        factors = _LAYERS * (_ROWS + _COLUMNS) + 512 + 128
        assert factors <= kept <= factors + 8  # and a few scalars
    else:
        wanted = traits.moments * matrices + traits.moments_of_rest * table
        assert wanted <= kept <= wanted + 8
