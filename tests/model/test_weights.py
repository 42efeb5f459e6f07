"""Declared weights: they are the parameters' shapes, roles and first values, and cheap to ask for."""

import time

import jax
import numpy as np
import pytest

from cramjax.config import LayerConfig, ModelConfig
from cramjax.model import count_parameters, weights_of
from cramjax.model.weights import Normal, Weight

from .small import CONFIGS, LENGTH, VOCAB, build

# First and last entry of what is drawn with key 11, as it was before weights were declared.
_DRAWN = {
    "modern": {
        "blocks/attention/out/kernel": (-0.28218928, -0.047719583),
        "blocks/attention/qkv/kernel": (-0.2717078, -0.076536998),
        "blocks/mlp/down/kernel": (-0.022321291, -0.15091379),
        "blocks/mlp/up/kernel": (-0.10878705, 0.010949451),
        "embed/token/table": (-0.05646123, 0.054499567),
        "embed/value/table": (-0.34198537, 0.10443387),
        "head/decoder/kernel": (-0.0023972841, -0.22749789),
    },
    "bert": {
        "blocks/attention/out/kernel": (-0.031926069, 0.0055945734),
        "blocks/attention/qkv/kernel": (-0.030740228, -0.017693944),
        "blocks/mlp/down/kernel": (-0.0030929288, -0.023297276),
        "blocks/mlp/up/kernel": (-0.01230785, -0.0081825126),
        "embed/position/table": (-0.020845437, -0.024404394),
        "embed/token/table": (-0.0063878587, 0.0061659222),
        "embed/token_type/table": (-0.038691226, 0.013679639),
        "head/transform/dense/kernel": (-0.00027122174, -0.018158857),
    },
    "adaptive": {
        "blocks/attention/out/kernel": (-0.031926069, -0.0074643181),
        "blocks/attention/qkv/kernel": (-0.030740228, -0.035410408),
        "blocks/mlp/down/kernel": (-0.0030929288, 0.0021759607),
        "blocks/mlp/up/kernel": (-0.01230785, 0.040608089),
        "embed/token/table": (-0.0063878587, 0.0061659222),
        "head/decoder/kernel": (-0.00027122174, 0.024817266),
        "head/tail0/decoder/kernel": (0.0078035365, 0.024788264),
        "head/tail0/down/kernel": (-0.022843072, 0.0085457331),
        "head/tail1/decoder/kernel": (0.014668056, -0.025526917),
        "head/tail1/down/kernel": (0.022443533, -0.028694263),
    },
}


def _named(tree):
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("name", _DRAWN)
def test_a_seed_gives_the_parameters_that_it_always_gave(name: str) -> None:
    params = _named(jax.jit(build(name).init)(jax.random.key(11)))
    drawn = {path for path, weight in _named(build(name).weights).items() if isinstance(weight.init, Normal)}
    for path, (first, last) in _DRAWN[name].items():
        assert path in drawn
        flat = np.asarray(params[path]).ravel()
        np.testing.assert_allclose([flat[0], flat[-1]], [first, last], rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", CONFIGS)
def test_declarations_are_those_of_the_parameters(name: str) -> None:
    model = build(name)
    started = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, started) == jax.tree.map(lambda w: w.stacked_shape, model.weights)
    assert model.abstract_params() == started
    for path, weight in _named(model.weights).items():
        assert len(weight.axes) == len(weight.shape), path
        assert (weight.repeats is None) != path.startswith("blocks/")
        assert not weight.widths or sum(weight.widths) == weight.shape[-1]


def test_roles() -> None:
    roles = {path: weight.role for name in CONFIGS for path, weight in _named(build(name).weights).items()}
    ends = {
        "embed/token/table": "embedding",
        "embed/position/table": "embedding",
        "embed/position/scale": "scalar",
        "blocks/attention/qkv/kernel": "matrix",
        "blocks/attention/qkv/bias": "bias",
        "blocks/attention_norm/weight": "norm",
        "blocks/attention_norm/bias": "bias",
        "blocks/skip/embedding": "scalar",
        "blocks/attention/value_gate": "scalar",
        "head/decoder/kernel": "head",
        "head/decoder/bias": "bias",
        "head/tail0/down/kernel": "matrix",
        "head/tail0/decoder/kernel": "head",
        "head/transform/dense/kernel": "matrix",
    }
    assert {path: roles[path] for path in ends} == ends


def test_counting_a_new_shape_traces_nothing_and_takes_milliseconds() -> None:
    pattern = (LayerConfig(window=8), LayerConfig())
    configs = [ModelConfig(layers=2 * n, width=32 * n, heads=n, mlp=64 * n, pattern=pattern) for n in range(1, 41)]
    count_parameters(configs[0], VOCAB, LENGTH)
    before = time.process_time()
    for config in configs[1:]:
        count_parameters(config, VOCAB, LENGTH)
    fresh = (time.process_time() - before) / len(configs[1:])
    before = time.process_time()
    for config in configs[1:]:
        count_parameters(config, VOCAB, LENGTH)
    again = (time.process_time() - before) / len(configs[1:])
    # 3 ms and 0.05 ms on an idle core of 2026; a trace would take hundreds.
    assert fresh < 0.03 and again < 0.003
    assert isinstance(weights_of(configs[0], VOCAB, LENGTH)["embed"]["token"]["table"], Weight)
