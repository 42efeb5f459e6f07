"""Prompts and prefixes in a model: each example of a row sees them as if it were alone, and so does a cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.adapters import AdapterConfig
from cramjax.config import ModelConfig
from cramjax.model import Model, make_model
from cramjax.model.objectives import examples_task
from cramjax.model.stack import virtual_tokens

COUNT, LENGTH, VOCAB = 3, 16, 40
EXAMPLES = ([5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17, 18])
CONFIGS: dict[str, dict[str, Any]] = {
    "learned": {"positions": "learned", "max_positions": LENGTH + COUNT, "norm": "layernorm", "mask_documents": True},
    "rotary": {
        "positions": "rotary",
        "kv_heads": 1,
        "qk_norm": True,
        "embedding_skip": True,
        "value_embeddings": True,
        "bigram_buckets": 16,
    },
}


def made(kind: Any, config: str) -> tuple[Model, Any]:
    """A model all of whose weights matter."""
    model = make_model(
        ModelConfig(layers=2, width=16, heads=2, mlp=32, **CONFIGS[config]),
        vocab_size=VOCAB,
        sequence_length=LENGTH,
        causal=True,
        separator_id=0,
        layer_loop="scan",
        adapter=AdapterConfig(kind, virtual_tokens=COUNT),
    )
    params = model.init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return model, jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), params)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_packed_and_cached_are_as_alone(kind: str, config: str) -> None:
    model, params = made(kind, config)
    assert virtual_tokens(params) == COUNT
    hidden = jax.jit(lambda params, tokens: model.hidden(params, tokens))

    def alone(ids: list[int]) -> np.ndarray:
        return np.asarray(hidden(params, jnp.asarray([[*ids, *[1] * (LENGTH - len(ids))]], jnp.int32)))[0, : len(ids)]

    rows, at = np.zeros((1, 3, LENGTH + 1), np.int32), 0
    for number, ids in enumerate(EXAMPLES, 1):
        rows[0, :, at : at + len(ids)], at = [ids, [number] * len(ids), [1] * len(ids)], at + len(ids)
    packed = jax.jit(lambda params, rows: model.hidden(params, **examples_task(rows).seen))(params, rows)[0]
    start = 0
    for ids in EXAMPLES:
        np.testing.assert_allclose(packed[start : start + len(ids)], alone(ids), atol=2e-5)
        start += len(ids)

    @jax.jit
    def cached(params: Any, tokens: jax.Array) -> jax.Array:
        cache = model.init_cache(2, 7, params)
        first, cache = model.decode(params, cache, tokens[:, :4], jnp.asarray([4, 2]))
        second, cache = model.decode(params, cache, tokens[:, 4:5], jnp.asarray([1, 0]))
        return jnp.concatenate([first, second, model.decode(params, cache, tokens[:, 5:6])[0]], axis=1)

    tokens = jnp.asarray([[5, 6, 7, 8, 9, 10], [11, 12, 1, 1, 1, 13]], jnp.int32)
    found = cached(params, tokens)
    np.testing.assert_allclose(found[0], alone([5, 6, 7, 8, 9, 10]), atol=2e-5)
    np.testing.assert_allclose(found[1, [0, 1, 5]], alone([11, 12, 13]), atol=2e-5)
    if kind == "prompt":
        with pytest.raises(ValueError, match="the cache holds no prompt"):
            model.decode(params, model.init_cache(2, 7), tokens)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_are_tokens_where_a_token_is_one(kind: str) -> None:
    """A prompt of rows of the table is the text of these tokens; a prefix of the keys and values of them too."""
    model, params = made("prompt", "learned")
    table = params["embed"]["token"]["table"]
    ids = jnp.asarray([[20, 21, 22]], jnp.int32)
    plain = {**params, "embed": {**params["embed"], "token": {"table": table.base}}}
    text = jnp.asarray([[5, 6, 7, 8]], jnp.int32)
    wanted = model.hidden(plain, jnp.concatenate([ids, text], axis=1))[:, COUNT:]
    if kind == "prompt":
        rows = type(table)(table.base, table.base[ids[0]])
        own = {**params, "embed": {**params["embed"], "token": {"table": rows}}}
    else:
        from cramjax.kernels.packed import Prefixed

        held = model.decode(plain, model.init_cache(1, COUNT), ids)[1].blocks[0]
        keys, values = (x.reshape(x.shape[0], COUNT, -1) for x in (held.keys, held.values))
        attention = plain["blocks"]["attention"]
        qkv = {**attention["qkv"], "kernel": Prefixed(attention["qkv"]["kernel"], keys, values)}
        own = {**plain, "blocks": {**plain["blocks"], "attention": {**attention, "qkv": qkv}}}
    np.testing.assert_allclose(model.hidden(own, text), wanted, atol=2e-5)
