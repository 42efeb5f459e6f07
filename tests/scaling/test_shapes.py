"""Shapes from sizes: realised within tolerance, by the stated rules; what cannot be is said with its neighbours."""

import re

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cramjax.errors import ConfigError
from cramjax.model import Model
from cramjax.recipes import load_recipe
from cramjax.scaling.shapes import Count, Shape, parameters_of, shape_for, shapes

BASE = load_recipe("gpt-mini", {"model.heads": 6, "model.adaptive_head": [], "tokenizer.vocab_size": 2048})
COUNTS: list[Count] = ["params", "params_non_embedding"]


def test_parameters_are_those_of_the_model():
    config = shape_for(1.3e6, BASE)
    model = Model(config.model, 2048, 128, True, separator_id=0, compute_dtype="float32", unroll=True, remat="none")
    assert parameters_of(config).total == sum(x.size for x in jax.tree.leaves(model.abstract_params()))


@settings(max_examples=30, deadline=None)
@given(shape=st.sampled_from(list(shapes(BASE, 1e7))), off=st.floats(0.92, 1.08), count=st.sampled_from(COUNTS))
def test_a_realised_size_is_near_and_follows_the_rules(shape: Shape, off: float, count: Count):
    size = getattr(shape, count) * off
    config = shape_for(size, BASE, count=count)
    model, counted = config.model, parameters_of(config)
    assert (counted.total if count == "params" else counted.blocks) == pytest.approx(size, rel=0.1)
    assert model.width == 32 * model.heads and model.mlp == 4 * model.width
    assert 0.5 <= model.width / model.layers / 64 <= 2
    # Muon's matrices keep their rate, the head's falls with the width: Yang et al., table 8.
    assert config.optim.lr == BASE.optim.lr and config.optim.embed_lr == BASE.optim.embed_lr
    assert config.optim.head_lr == pytest.approx(0.02 * 192 / model.width, rel=1e-3)


def test_the_base_is_of_its_own_family():
    assert shape_for(parameters_of(BASE).total, BASE) == BASE


def test_rates_of_adam_fall_with_the_width():
    base = load_recipe("quickstart", {"optim.name": "adamw", "optim.lr": 1e-3, "optim.embed_lr": 2e-3})
    config = shape_for(4 * parameters_of(base).total, base)
    wider = config.model.width / base.model.width
    assert wider > 1
    assert config.optim.lr == pytest.approx(1e-3 / wider, rel=1e-3)
    assert config.optim.embed_lr == 2e-3


def test_grouped_heads_keep_their_proportion():
    base = load_recipe("gpt-mini", {"model.heads": 6, "model.kv_heads": 2})
    for size in shapes(base, 1e7):
        assert size.model.heads == 3 * (size.model.kv_heads or 0)


def test_batch_grows_with_the_budget_as_published():
    """DeepSeek LLM, equation 1: 8 times the FLOPs is 8^0.3271 = 1.974 times the batch."""
    same = shape_for(1.3e6, BASE, flops=1e13, tuned_at=1e13)
    assert same.batch == BASE.batch == shape_for(1.3e6, BASE, flops=1e13).batch
    assert shape_for(1.3e6, BASE, flops=8e13, tuned_at=1e13).batch.size == 64


@pytest.mark.parametrize("size", [5e3, 2.4e5])
def test_a_size_between_shapes_is_refused_with_its_neighbours(size: float):
    with pytest.raises(ConfigError, match=r"no model of this family has about .* the nearest have") as error:
        shape_for(size, BASE)
    told = re.findall(r"[\d,]*\d", str(error.value).split("nearest have")[1].split(". Heads")[0])
    neighbours = [int(number.replace(",", "")) for number in told]
    assert len(neighbours) == (1 if size < 1e5 else 2)
    for neighbour in neighbours:
        assert parameters_of(shape_for(neighbour, BASE)).total == neighbour


def test_between_two_shapes_the_nearest_if_it_may_be_as_far():
    model = {"heads": 12, "adaptive_head": []}
    base = load_recipe("gpt-mini", {"data.sequence_length": 64, "tokenizer.vocab_size": 1024, "model": model})
    with pytest.raises(ConfigError, match="the nearest have 240,642 and 307,202"):
        shape_for(269_862, base)
    assert parameters_of(shape_for(269_862, base, tolerance=0.25)).total == 240_642
