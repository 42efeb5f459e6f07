"""Grouped products against a loop in float64, values and gradients: every implementation; and how rows are sorted."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax import devices
from cramjax.errors import ConfigError
from cramjax.kernels.grouped import (
    arrange,
    arrange_within,
    combine,
    dispatch,
    grouped,
    most_blocks,
    rows_of_block,
)
from cramjax.kernels.grouped.api import IMPLEMENTATIONS, preference
from cramjax.kernels.packed import quantise

TOKENS, GROUPS, CHOICES, INNER, OUTER = 37, 5, 2, 16, 24
_RNG = np.random.default_rng(0)
# Nobody chooses group 3, and group 1 is chosen by most.
_CHOSEN = np.stack([_RNG.choice([0, 1, 2, 4], 2, replace=False, p=[0.1, 0.6, 0.2, 0.1]) for _ in range(TOKENS)])
_X, _W = _RNG.normal(size=(TOKENS, INNER)), _RNG.normal(size=(GROUPS, INNER, OUTER))
_GATES, _BY = _RNG.uniform(size=(TOKENS, CHOICES)), _RNG.normal(size=(TOKENS, OUTER))


def _by_definition(kept: np.ndarray) -> tuple[np.ndarray, ...]:
    """The sum of each token's gated products, and the gradients of its product with `_BY`, in float64."""
    y, by_x, by_w, by_gates = np.zeros((TOKENS, OUTER)), np.zeros_like(_X), np.zeros_like(_W), np.zeros_like(_GATES)
    for token, choice in zip(*np.nonzero(kept), strict=True):
        group, gate = _CHOSEN[token, choice], _GATES[token, choice]
        product = _X[token] @ _W[group]
        y[token] += gate * product
        by_gates[token, choice] = product @ _BY[token]
        by_x[token] += gate * _W[group] @ _BY[token]
        by_w[group] += gate * np.outer(_X[token], _BY[token])
    return y, by_x, by_w, by_gates


def _computed(name: str | None, dtype: str, capacity: int | None, block: int) -> tuple[np.ndarray, ...]:
    chosen = jnp.asarray(_CHOSEN, jnp.int32)

    def function(x: Any, w: Any, gates: Any) -> Any:
        made = arrange(chosen, GROUPS, block) if capacity is None else arrange_within(chosen, GROUPS, capacity)
        return combine(grouped(dispatch(x, made), w, made.groups, dtype=dtype, implementation=name), gates, made)

    y, pull = jax.vjp(jax.jit(function), jnp.asarray(_X, dtype), jnp.asarray(_W, "float32"), jnp.asarray(_GATES))
    assert y.dtype == dtype
    return tuple(np.asarray(each, np.float64) for each in (y, *pull(jnp.asarray(_BY, dtype))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "block"), [("loop", 8), ("scan", 8), ("ragged", 1), ("ragged", 4), ("reference", 8)])
def test_dropless_products_are_those_of_a_loop_in_float64(name: str, block: int, dtype: str) -> None:
    wanted = _by_definition(np.ones_like(_CHOSEN, bool))
    # Sums of at most 37 · 16 products: float32's rounding, or bfloat16's of operands, results and their gradients.
    near = 1e-5 if dtype == "float32" else 3 * 2**-8
    for got, want in zip(_computed(name, dtype, None, block), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=near * np.abs(want).max())


def test_who_is_of_no_group_takes_no_room() -> None:
    nobody = np.arange(TOKENS) % 3 == 0
    chosen = jnp.asarray(np.where(nobody[:, None], GROUPS, _CHOSEN), jnp.int32)
    made, alone = arrange_within(chosen, GROUPS, 7), arrange_within(chosen[~nobody], GROUPS, 7)
    assert np.all(np.asarray(made.place)[nobody] == made.groups.rows)
    np.testing.assert_array_equal(np.asarray(made.place)[~nobody], alone.place)
    np.testing.assert_array_equal(dispatch(jnp.asarray(_X), made), dispatch(jnp.asarray(_X[~nobody]), alone))


@pytest.mark.parametrize("name", ["batched", "loop", "scan", "reference"])
def test_a_capacity_drops_the_last_tokens_of_each_group(name: str) -> None:
    capacity, kept, taken = 7, np.zeros_like(_CHOSEN, bool), np.zeros(GROUPS, int)
    for place in np.ndindex(*_CHOSEN.shape):
        kept[place] = taken[_CHOSEN[place]] < capacity
        taken[_CHOSEN[place]] += 1
    assert not kept.all()
    for got, want in zip(_computed(name, "float32", capacity, 8), _by_definition(kept), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("rows", [1, 64])
def test_packed_matrices_multiply_their_own_rows(rows: int) -> None:
    w = quantise(jnp.asarray(_W, jnp.float32), 8, 8)
    chosen = jnp.asarray(_CHOSEN[:rows, :1] if rows < TOKENS else np.resize(_CHOSEN, (rows, 1)), jnp.int32)
    x = jnp.asarray(_RNG.normal(size=(rows, INNER)), jnp.float32)
    made = arrange(chosen, GROUPS, rows_of_block("cpu", rows, GROUPS))

    def function(x: Any, w: Any) -> Any:
        return jnp.sum(jnp.square(grouped(dispatch(x, made), w, made.groups)[made.place[:, 0]]))

    own, array = (jax.jit(jax.value_and_grad(function))(x, each) for each in (w, w.unpacked()))
    np.testing.assert_allclose(own[0], array[0], rtol=1e-5)
    np.testing.assert_allclose(own[1], array[1], rtol=0, atol=1e-5 * float(jnp.abs(array[1]).max()))
    with pytest.raises(ConfigError, match="'scan' cannot run here: it multiplies with arrays, and the matrices are"):
        grouped(dispatch(x, made), w, made.groups, implementation="scan")


def test_every_row_lies_in_a_block_of_its_group() -> None:
    sort = jax.jit(arrange, static_argnums=(1, 2))
    for rows, groups, block in ((1, 4, 8), (50, 3, 8), (64, 64, 16)):
        chosen = jnp.asarray(_RNG.integers(0, groups, (rows, 1)), jnp.int32)
        made = sort(chosen, groups, block)
        assert made.groups.blocks == most_blocks(rows, groups, block) >= int(made.groups.bounds[-1])
        place = np.asarray(made.place[:, 0])
        assert len(set(place.tolist())) == rows
        owner = np.searchsorted(np.asarray(made.groups.bounds)[1:], place // block, side="right")
        np.testing.assert_array_equal(owner, chosen[:, 0])
        source = np.asarray(made.source)
        np.testing.assert_array_equal(source[place], np.arange(rows))
        assert np.sum(source < rows) == rows
    worst = jnp.asarray([0] * 9 + [1, 2, 3], jnp.int32)[:, None]  # as many blocks as there can be
    made = sort(worst, 4, 8)
    assert int(made.groups.bounds[-1]) == made.groups.blocks == 5


@pytest.mark.parametrize(
    ("platform", "rows", "groups", "block"),
    [
        ("cpu", 4096, 8, 64),
        ("cpu", 2048, 64, 16),
        ("cpu", 8, 8, 8),
        ("cpu", 1, 64, 1),
        ("gpu", 32768, 16, 1024),
        ("gpu", 4096, 64, 32),
        ("tpu", 4096, 8, 1),
    ],
)
def test_blocks_are_about_half_of_a_group(platform: str, rows: int, groups: int, block: int) -> None:
    assert rows_of_block(platform, rows, groups) == block


def test_what_is_tried_first_is_what_the_device_is_fast_with(monkeypatch: pytest.MonkeyPatch) -> None:
    firsts = {platform: preference(platform)[:2] for platform in ("cpu", "gpu", "tpu")}
    assert firsts == {"cpu": ("batched", "loop"), "gpu": ("batched", "scan"), "tpu": ("ragged", "batched")}
    assert all(set(preference(platform)) == set(IMPLEMENTATIONS) for platform in firsts)
    monkeypatch.setattr(devices, "target", lambda: devices.Target("gpu", "NVIDIA A100-SXM4-40GB", "8.0"))
    made = arrange(jnp.asarray(_CHOSEN, jnp.int32), GROUPS, 8)
    text = str(jax.make_jaxpr(lambda x, w: grouped(dispatch(x, made), w, made.groups))(_X, _W))
    assert re.search(r"\bscan\[", text) and "while[" not in text
    with pytest.raises(ConfigError, match="'batched' cannot run here: groups have different numbers of rows"):
        grouped(dispatch(jnp.asarray(_X), made), jnp.asarray(_W), made.groups, implementation="batched")


def test_shapes_that_do_not_fit_are_refused() -> None:
    made = arrange(jnp.asarray(_CHOSEN, jnp.int32), GROUPS, 8)
    with pytest.raises(ValueError, match=r"w \(5, inner, outer\), got"):
        grouped(dispatch(jnp.asarray(_X), made), jnp.zeros((4, INNER, OUTER)), made.groups)
