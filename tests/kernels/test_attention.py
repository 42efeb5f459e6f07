"""Every attention implementation against the definition in float64 numpy: outputs, gradients, all masks."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cramjax.errors import ConfigError
from cramjax.kernels.attention import api, attention, implementations
from cramjax.kernels.attention.xla import chunk_size

_SEQ = 21


def _segments(batch: int, length: int) -> np.ndarray:
    return np.cumsum(np.random.default_rng(1).random((batch, length)) < 0.2, axis=1).astype(np.int32)


def _padding(batch: int, length: int) -> np.ndarray:
    mask = np.random.default_rng(2).random((batch, length)) < 0.6
    mask[0] = False  # a row of the batch that sees nothing at all
    return mask


_CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {"causal": False},
    "window": {"causal": True, "window": 5},
    "window both ways": {"causal": False, "window": 4},
    "segments": {"causal": True, "segment_ids": _segments(2, _SEQ)},
    "segments both ways": {"causal": False, "segment_ids": _segments(2, _SEQ)},
    "padding": {"causal": False, "kv_mask": _padding(2, _SEQ)},
    "causal padding": {"causal": True, "kv_mask": _padding(2, _SEQ)},
    "grouped": {"causal": True, "kv_heads": 2},
    "one kv head": {"causal": False, "kv_heads": 1, "segment_ids": _segments(2, _SEQ)},
    "softcap": {"causal": True, "softcap": 1.5},
    "scale": {"causal": False, "scale": 0.7},
    "cache": {"causal": True, "queries": 3, "query_positions": np.array([[4, 5, 6], [17, 18, 19]], np.int32)},
    "fewer keys": {"causal": False, "keys": 9, "window": 3},
    "everything": {
        "causal": True,
        "window": 9,
        "kv_heads": 2,
        "softcap": 2.0,
        "segment_ids": _segments(2, _SEQ),
        "kv_mask": _padding(2, _SEQ),
    },
}


def _operands(
    *, length: int = _SEQ, queries: int | None = None, keys: int | None = None, heads: int = 4, kv_heads: int = 4
):
    rng = np.random.default_rng(3)
    q = rng.normal(size=(2, queries or length, heads, 8))
    k, v = (rng.normal(size=(2, keys or length, kv_heads, 8)) for _ in range(2))
    return q, k, v, rng.normal(size=q.shape)


def _allowed(q_len: int, k_len: int, case: dict[str, Any]) -> np.ndarray:
    """The definition of each mask, pair by pair."""
    allowed = np.ones((2, q_len, k_len), bool)
    segments, padding, window = case.get("segment_ids"), case.get("kv_mask"), case.get("window")
    for b in range(2):
        for i in range(q_len):
            at = i if case.get("query_positions") is None else int(case["query_positions"][b, i])
            for j in range(k_len):
                seen = not case["causal"] or j <= at
                if window is not None:
                    seen = seen and abs(at - j) < window
                if segments is not None:
                    seen = seen and segments[b, i] == segments[b, j]
                if padding is not None:
                    seen = seen and padding[b, j]
                allowed[b, i, j] = seen
    return allowed


def _float64(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, case: dict[str, Any]):
    """Output and gradients by the textbook formulas, in float64."""
    groups = q.shape[2] // k.shape[2]
    keys, values = np.repeat(k, groups, 2), np.repeat(v, groups, 2)
    scale = case.get("scale") or q.shape[-1] ** -0.5
    raw = np.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    cap = case.get("softcap")
    scores = raw if cap is None else cap * np.tanh(raw / cap)
    powers = np.exp(scores - scores.max()) * _allowed(q.shape[1], k.shape[1], case)[:, None]
    total = powers.sum(-1, keepdims=True)
    p = powers / np.where(total == 0, 1, total)
    out = np.einsum("bhqk,bkhd->bqhd", p, values)
    dp = np.einsum("bqhd,bkhd->bhqk", g, values)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    if cap is not None:
        ds = ds * (1 - np.square(scores / cap))
    dq = np.einsum("bhqk,bkhd->bqhd", ds, keys) * scale
    dk = np.einsum("bhqk,bqhd->bkhd", ds, q) * scale
    dv = np.einsum("bhqk,bqhd->bkhd", p, g)
    grouped = [x.reshape(*k.shape[:3], groups, -1).sum(3) for x in (dk, dv)]
    return out, dq, *grouped


def _arguments(case: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a case, as JAX arrays where they are arrays."""
    given = {key: value for key, value in case.items() if key not in ("kv_heads", "queries", "keys")}
    return {key: jnp.asarray(value) if isinstance(value, np.ndarray) else value for key, value in given.items()}


def _shape(case: dict[str, Any]) -> dict[str, int]:
    return {key: case[key] for key in ("kv_heads", "queries", "keys") if key in case}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", _CASES)
@pytest.mark.parametrize("implementation", implementations())
def test_output_and_gradients_match_float64(implementation: str, name: str, dtype: str) -> None:
    case = _CASES[name]
    operands = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in _operands(**_shape(case))]
    q, k, v, g = (jnp.asarray(x, dtype) for x in operands)

    @jax.jit
    def output_and_gradients(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        arguments = _arguments(case)
        out, pullback = jax.vjp(lambda *qkv: attention(*qkv, implementation=implementation, **arguments), q, k, v)
        return out, *pullback(g)

    results = output_and_gradients(q, k, v, g)
    assert all(x.dtype == dtype for x in results)
    # Both operands of every sum are rounded once or twice: 2^-24 and 2^-8 relative, over sums of up to 21 terms near 1.
    tolerance = 1e-5 if dtype == "float32" else 6e-2
    for got, wanted in zip(results, _float64(*operands, case), strict=True):
        assert np.abs(np.asarray(got, np.float64) - wanted).max() < tolerance


@pytest.mark.parametrize("implementation", implementations())
def test_queries_that_see_nothing_yield_zeros_and_no_gradient(implementation: str) -> None:
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in _operands())
    kv_mask = jnp.zeros((2, _SEQ), bool).at[1].set(True)
    arguments = {"causal": True, "kv_mask": kv_mask, "implementation": implementation}
    out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, **arguments), q, k, v)
    assert (out[0] == 0).all() and (out[1] != 0).any()
    for gradient in pullback(jnp.ones_like(out)):
        assert (gradient[0] == 0).all() and jnp.isfinite(gradient).all()


@settings(max_examples=10, deadline=None)
@given(
    length=st.integers(1, 150),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3), (6, 1)]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 160),
)
def test_any_shape_matches_float64(length: int, heads: tuple[int, int], causal: bool, window: int | None) -> None:
    case = {"causal": causal, "window": window}
    operands = _operands(length=length, heads=heads[0], kv_heads=heads[1])
    q, k, v, g = (jnp.asarray(x, jnp.float32) for x in operands)

    @jax.jit
    def output_and_gradients(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, implementation="xla", **case), q, k, v)
        return out, *pullback(g)

    for got, wanted in zip(output_and_gradients(q, k, v, g), _float64(*operands, case), strict=True):
        np.testing.assert_allclose(got, wanted, atol=5e-5)  # float32 sums of up to 150 terms near 1


def test_chunks_skip_work_under_a_causal_mask() -> None:
    q = jax.ShapeDtypeStruct((1, 512, 1, 64), jnp.float32)

    def flops(causal: bool) -> float:
        return jax.jit(lambda q: attention(q, q, q, causal=causal)).lower(q).compile().cost_analysis()["flops"]

    # With chunks of 64 queries, 36 of 64 blocks remain.
    assert flops(True) < 0.6 * flops(False)


@pytest.mark.parametrize("length", [1, 64, 129, 1000, 4096])
def test_long_sequences_have_at_most_eight_chunks(length: int) -> None:
    assert -(-length // chunk_size(length)) <= 8


def test_an_unknown_implementation_is_an_error() -> None:
    q, k, v, _ = map(jnp.asarray, _operands())
    with pytest.raises(ConfigError, match="no attention implementation 'flash': choose from xla, reference"):
        attention(q, k, v, causal=True, implementation="flash")


def test_an_implementation_that_refuses_is_an_error_by_name_and_a_log_line_otherwise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    picky = dataclasses.replace(api.IMPLEMENTATIONS[0], name="picky", refusal=lambda q, k, mask: "it is Monday")
    monkeypatch.setattr(api, "IMPLEMENTATIONS", (picky, *api.IMPLEMENTATIONS))
    q, k, v, _ = map(jnp.asarray, _operands())
    with pytest.raises(ConfigError, match="'picky' cannot run here: it is Monday"):
        attention(q, k, v, causal=True, implementation="picky")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            attention(q, k, v, causal=True)
    assert [record.getMessage() for record in caplog.records] == ["attention: not picky, because it is Monday"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": np.zeros((2, 21, 3, 8))}, "kv_heads must divide heads, got 3 for 4 heads"),
        ({"k": np.zeros((1, 21, 4, 8))}, r"k must have shape \(2, 21, 4, 8\)"),
        ({"v": np.zeros((2, 20, 4, 8))}, r"v must have shape \(2, 21, 4, 8\)"),
        ({"segment_ids": np.zeros((2, 20), int)}, r"segment_ids must have shape \(2, 21\)"),
        ({"kv_mask": np.zeros((21,), bool)}, r"kv_mask must have shape \(2, 21\)"),
        ({"kv_segment_ids": np.zeros((2, 21), int)}, "needs segment_ids"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, _ = map(jnp.asarray, _operands())
    # As a user runs it, without the checks that the test suite puts around annotated functions.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    change = {name: jnp.asarray(array) for name, array in change.items()}
    with pytest.raises(ValueError, match=message):
        attention(**{"q": q, "k": k, "v": v, "causal": True, **change})
