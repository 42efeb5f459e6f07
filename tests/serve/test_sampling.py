"""How tokens are drawn, as a user says it."""

import pytest

from cramjax.errors import ConfigError
from cramjax.serve.sampling import Sampling


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_impossible_values_are_named(bad: dict):
    name, value = next(iter(bad.items()))
    with pytest.raises(ConfigError, match=f"{name} must be .*got {value}"):
        Sampling(**bad)
