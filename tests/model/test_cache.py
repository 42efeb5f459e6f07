"""Caches: rings hold a window and give what contiguous ones do, and a walk may hold one block's weights at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import LayerConfig, ModelConfig
from cramjax.model import make_model
from cramjax.model.cache import Contiguous, Ring
from cramjax.model.decode import begin, finish, init_cache

from .small import LENGTH, SEPARATOR, VOCAB, batch, trained_like

_WINDOW = 3
_CONFIG = ModelConfig(
    layers=4,
    width=16,
    heads=4,
    kv_heads=2,
    mlp=16,
    pattern=(LayerConfig(window=_WINDOW), LayerConfig()),
    mask_documents=True,
)


def _made(**options: Any) -> Any:
    config = dataclasses.replace(_CONFIG, **options)
    return make_model(config, vocab_size=VOCAB, sequence_length=LENGTH, causal=True, separator_id=SEPARATOR)


def test_blocks_with_a_window_hold_no_more_than_it() -> None:
    ring, whole = init_cache(_made(), 2, LENGTH).blocks
    assert isinstance(ring, Ring) and ring.keys.shape == (2, 2, _WINDOW, 2, 4)
    assert isinstance(whole, Contiguous) and whole.keys.shape == (2, 2, LENGTH, 2, 4)
    assert isinstance(init_cache(_made(), 2, _WINDOW).blocks[0], Contiguous)  # nothing to be saved
    shapes = jax.eval_shape(lambda: init_cache(_made(), 2, LENGTH))
    assert shapes.blocks[0].keys.shape == ring.keys.shape and shapes.capacity == LENGTH


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("chunks", [(12,), (1, 1, 1, 1, 8), (5, 1, 2, 4), (2, 10)])
def test_decoding_in_chunks_is_the_whole_forward_pass(chunks: tuple[int, ...], documents: bool) -> None:
    model = _made(mask_documents=documents)
    params, tokens = trained_like(model), batch()
    expected = jax.jit(model.hidden)(params, tokens)
    decode, cache, at = jax.jit(model.decode), model.init_cache(2, LENGTH), 0
    for count in chunks:
        hidden, cache = decode(params, cache, tokens[:, at : at + count])
        np.testing.assert_allclose(hidden, expected[:, at : at + count], atol=1e-5)
        at += count


def test_rows_of_different_lengths_do_not_meet() -> None:
    model = _made()
    params, tokens, decode = trained_like(model), batch(), jax.jit(model.decode)
    expected = jax.jit(model.hidden)(params, tokens)
    cache = model.init_cache(2, LENGTH)
    lengths = np.zeros(2, int)
    for counts in ((5, 2), (0, 4), (4, 1), (3, 5)):
        chunk = np.zeros((2, 5), np.int32)
        for row, count in enumerate(counts):
            chunk[row, :count] = tokens[row, lengths[row] : lengths[row] + count]
        hidden, cache = decode(params, cache, jnp.asarray(chunk), jnp.asarray(counts))
        for row, count in enumerate(counts):
            wanted = expected[row, lengths[row] : lengths[row] + count]
            np.testing.assert_allclose(hidden[row, :count], wanted, atol=1e-5)
        lengths += counts
    assert lengths.tolist() == [LENGTH, LENGTH] == cache.length.tolist()


def test_a_walk_may_hold_one_blocks_weights_at_a_time() -> None:
    model = _made()
    params, tokens = trained_like(model), batch()
    outer = {part: params[part] for part in ("embed", "head")}
    expected, after = jax.jit(model.decode)(params, model.init_cache(2, LENGTH), tokens[:, :7])

    @jax.jit
    def step(block: Any, x: jax.Array, context: Any, repeat: jax.Array, caches: Any) -> Any:
        return model.decode_block(block, x, context, repeat, caches)

    cache = model.init_cache(2, LENGTH)
    x, begun = begin(model, outer, cache, tokens[:, :7])
    caches = cache.blocks
    for repeat in range(model.repeats):
        block = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], params["blocks"])  # for example from a disk
        x, caches = step(block, x, begun.context, jnp.int32(repeat), caches)
    hidden, cache = finish(model, outer, cache, begun, x, caches)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    assert jax.tree.structure(cache) == jax.tree.structure(after)
    for own, wanted in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(own, wanted, atol=1e-5)
