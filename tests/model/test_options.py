"""Options of the block that change little: what each of them adds, against the definition or the model without it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import ModelConfig
from cramjax.errors import ConfigError
from cramjax.model import Model, count_parameters, make_model
from cramjax.recipes import load_recipe

from .small import CONFIGS, LENGTH, VOCAB, batch, build, trained_like


def _with(name: str, **options: Any) -> Model:
    causal = name != "bert"
    config = dataclasses.replace(CONFIGS[name], **options)
    return make_model(config, vocab_size=VOCAB, sequence_length=LENGTH, causal=causal, separator_id=0)


def _logits(model: Model, params: Any, **seen: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: model.logits(p, model.hidden(p, batch(), **seen)))(params))


@pytest.mark.parametrize(
    ("name", "options", "gone"),
    [
        ("gpt2", {"norm_bias": False}, "norm/bias"),
        ("bert", {"head_transform_bias": False}, "transform/dense/bias"),
        ("gpt2", {"bias": False, "qkv_bias": True}, "out/bias|up/bias|down/bias"),
    ],
)
def test_a_model_without_biases_is_one_whose_biases_are_zero(name: str, options: Any, gone: str) -> None:
    whole, less = build(name), _with(name, **options)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.zeros_like(leaf)
            if any(jax.tree_util.keystr(path, simple=True, separator="/").endswith(end) for end in gone.split("|"))
            else leaf
        ),
        trained_like(whole),
    )
    wanted, own = less.abstract_params(), params
    cut = jax.tree_util.tree_map_with_path(lambda path, _: _at(own, path), wanted)
    assert len(jax.tree.leaves(cut)) < len(jax.tree.leaves(own))
    np.testing.assert_allclose(_logits(less, cut), _logits(whole, own), atol=1e-6)
    assert count_parameters(less.config, VOCAB, LENGTH).total == sum(leaf.size for leaf in jax.tree.leaves(wanted))


def _at(tree: Any, path: Any) -> Any:
    for key in path:
        tree = tree[key.key]
    return tree


def test_token_types_are_rows_of_their_table() -> None:
    model = build("bert")
    params = trained_like(model)
    types = jnp.asarray(np.arange(LENGTH) >= 6, jnp.int32)[None].repeat(2, 0)
    table = params["embed"]["token_type"]["table"]
    x, _ = model.embed(params, batch(), token_types=types)
    swapped = params | {"embed": params["embed"] | {"token_type": {"table": table[::-1]}}}
    first, second = (model.embed(p, batch())[0] for p in (params, swapped))
    np.testing.assert_array_equal(x, jnp.where(types[..., None] == 0, first, second))
    given = _logits(model, params, token_types=jnp.zeros_like(types))
    np.testing.assert_allclose(given, _logits(model, params), atol=1e-5)


def test_the_embedding_is_scaled_after_the_lookup() -> None:
    scaled, plain = _with("bare", embedding_scale=3.0), build("bare")
    params = trained_like(plain)
    x, same = (model.embed(params, batch())[0] for model in (scaled, plain))
    np.testing.assert_array_equal(x, 3.0 * same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.qk_norm": False, "model.qk_norm_weight": True}, "weights of that norm"),
        ({"model.attention_scale": 0.1, "model.mup_base_width": 64}, "leave one out"),
        ({"model.positions": "learned", "model.rope_scaling": {"kind": "linear", "factor": 2}}, "positions is learned"),
        ({"model.rope_scaling": {"kind": "linear", "factor": 2, "attention_factor": 1}}, "only yarn has one"),
        ({"model.rope_scaling": {"kind": "llama3", "factor": 2, "low_factor": 4}}, "low_factor must be below"),
        ({"model.rope_scaling": {"kind": "yarn", "factor": 0.5}}, "rope_scaling.factor must be at least 1, got 0.5"),
        (
            {"model.rope_scaling": {"kind": "ntk", "factor": 2}},
            "rope_scaling.kind must be one of linear, llama3, yarn, got .ntk.",
        ),
        ({"model.attention_softcap": 0}, "attention_softcap must be above 0"),
    ],
)
def test_what_excludes_each_other_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("quickstart", options)


def test_sandwich_norms_and_weights_of_heads_are_counted() -> None:
    options = {"norm": "rmsnorm", "norm_position": "sandwich", "qk_norm": True, "qk_norm_weight": True}
    config = ModelConfig(layers=2, width=16, heads=2, mlp=16, **options)
    model = make_model(config, vocab_size=VOCAB, sequence_length=LENGTH, causal=True)
    blocks = jax.tree.leaves(model.abstract_params()["blocks"])
    assert count_parameters(config, VOCAB, LENGTH).blocks == sum(leaf.size for leaf in blocks)
