"""The coordinate check: µP's activations move alike at every width, and the standard parametrisation's do not."""

import dataclasses

import numpy as np
import pytest

from cramjax.config import BatchConfig, DataConfig, ModelConfig, OptimConfig, RunConfig
from cramjax.errors import ConfigError
from cramjax.scaling import CoordinateCheck, coordinate_check
from cramjax.scaling.coordinates import widened

CONFIG = RunConfig(
    model=ModelConfig(layers=1, width=64, heads=2, mlp=256, norm="rmsnorm", mup_base_width=64),
    data=DataConfig(sequence_length=8),
    batch=BatchConfig(size=1),
    optim=OptimConfig(lr=2e-3),
)
WIDTHS = (64, 256)


@pytest.mark.slow
def test_slopes_are_flat_under_mup_and_not_in_the_standard_parametrisation():
    options = {"steps": 3, "seeds": 1, "vocab_size": 64}
    flat = coordinate_check(CONFIG, WIDTHS, **options)
    assert flat.names == ("embedding", "block 0", "logits")
    assert all(abs(slope) < 0.15 for slope in flat.slopes.values()), flat
    model = dataclasses.replace(CONFIG.model, mup_base_width=None)
    steep = coordinate_check(dataclasses.replace(CONFIG, model=model), WIDTHS, **options)
    assert steep.slopes["block 0"] > 0.4 and steep.slopes["logits"] > 0.4, steep
    # Before the first step nothing has changed, and at the base width the two are one.
    assert (flat.changes[:, 0] == 0).all()
    np.testing.assert_array_equal(flat.sizes[0], steep.sizes[0])


def test_the_slope_is_that_of_a_power_law():
    widths = (64, 128, 256)
    changes = np.asarray(widths, float)[:, None, None] ** np.array([0.0, 0.5, -1.0]) * np.array([0.0, 1.0])[:, None]
    check = CoordinateCheck(widths, ("a", "b", "c"), changes, changes)
    assert check.slopes == pytest.approx({"a": 0.0, "b": 0.5, "c": -1.0}, abs=1e-12)
    assert "b" in str(check) and "+0.500" in str(check) and "-1.000" in check._repr_html_()
    assert "<svg" in check.plot()._repr_svg_()


def test_heads_grow_in_number_or_in_width():
    model = ModelConfig(width=64, heads=4, kv_heads=2, mlp=192)
    wide = widened(model, 128)
    assert (wide.heads, wide.kv_heads, wide.head_dim, wide.mlp) == (8, 4, 16, 384)
    wide = widened(dataclasses.replace(model, mup_base_width=64, mup_base_head_dim=16), 128)
    assert (wide.heads, wide.kv_heads, wide.head_dim, wide.mlp) == (4, 2, 32, 384)
    with pytest.raises(ConfigError, match=r"heads=4 cannot be made 72 wide: 4 · 72 / 64 is not a whole number"):
        widened(model, 72)


def test_mistakes():
    with pytest.raises(ConfigError, match=r"two widths or more .* got widths \[64\]"):
        coordinate_check(CONFIG, [64])
    lomo = dataclasses.replace(CONFIG, optim=OptimConfig(name="lomo"))
    with pytest.raises(ConfigError, match="works with optim.name=adamw"):
        coordinate_check(lomo, WIDTHS)
