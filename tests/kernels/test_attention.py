"""Every attention implementation against the definition in float64 numpy: outputs, gradients, all masks."""

import functools
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
from cramjax.kernels.attention import api, attention, xla
from cramjax.kernels.attention.pallas import pallas
from cramjax.kernels.attention.reference import reference
from cramjax.kernels.attention.tiles import Tile, Tiles
from cramjax.kernels.choice import Implementation, never

# cuDNN is not here: it has no way to run without a GPU.
_IMPLEMENTATIONS = ("pallas", "xla", "reference")

# So small that each kernel's loop has two tiles to visit at 17 tokens, some of which the masks empty.
_TILES = Tiles(Tile(32, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 32, 4, 2))


def _interpret(monkeypatch: pytest.MonkeyPatch, tiles: Tiles | None) -> None:
    """Let the GPU kernels run here, as plain operations."""
    compute = functools.partial(pallas, tiles=tiles, interpret=True)
    kernels = Implementation("pallas", compute, never)
    monkeypatch.setitem(api.IMPLEMENTATIONS, "pallas", kernels)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    _interpret(monkeypatch, _TILES)


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
    "segments": {"causal": True, "segment_ids": _segments},
    "segments both ways": {"causal": False, "segment_ids": _segments},
    "padding": {"causal": False, "kv_mask": _padding},
    "causal padding": {"causal": True, "kv_mask": _padding},
    "grouped": {"causal": True, "kv_heads": 2},
    "one kv head": {"causal": False, "kv_heads": 1, "segment_ids": _segments},
    "softcap": {"causal": True, "softcap": 1.5},
    "scale": {"causal": False, "scale": 0.7},
    "cache": {"causal": True, "queries": 3, "query_positions": np.array([[4, 5, 6], [14, 15, 16]], np.int32)},
    "fewer keys": {"causal": False, "keys": 9, "window": 3},
    "everything": {
        "causal": True,
        "window": 9,
        "kv_heads": 2,
        "softcap": 2.0,
        "segment_ids": _segments,
        "kv_mask": _padding,
    },
}


_KERNEL_CASES = ("causal", "window both ways", "causal padding", "one kv head", "fewer keys", "everything")


def _case(name: str, length: int) -> dict[str, Any]:
    """A case for sequences of some length."""
    return {key: value(2, length) if callable(value) else value for key, value in _CASES[name].items()}


def _operands(
    *,
    length: int = 17,
    queries: int | None = None,
    keys: int | None = None,
    heads: int = 4,
    kv_heads: int = 4,
    head_dim: int = 8,
):
    rng = np.random.default_rng(3)
    q = rng.normal(size=(2, queries or length, heads, head_dim))
    k, v = (rng.normal(size=(2, keys or length, kv_heads, head_dim)) for _ in range(2))
    return q, k, v, rng.normal(size=q.shape)


def _allowed(q_len: int, k_len: int, case: dict[str, Any]) -> np.ndarray:
    """The definition of each mask."""
    positions = case.get("query_positions")
    at = (np.arange(q_len)[None] if positions is None else positions)[:, :, None]
    keys = np.arange(k_len)
    allowed = np.ones((2, q_len, k_len), bool)
    if case["causal"]:
        allowed &= keys <= at
    if case.get("window") is not None:
        allowed &= np.abs(at - keys) < case["window"]
    if case.get("segment_ids") is not None:
        allowed &= case["segment_ids"][:, :, None] == case["segment_ids"][:, None, :]
    if case.get("kv_mask") is not None:
        allowed &= case["kv_mask"][:, None, :]
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


def _check(operands: Any, case: dict[str, Any], implementation: str, dtype: str) -> None:
    """Compare output and gradients with those by the definition."""
    operands = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in operands]
    q, k, v, g = (jnp.asarray(x, dtype) for x in operands)

    @jax.jit
    def output_and_gradients(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        arguments = _arguments(case)
        out, pullback = jax.vjp(lambda *qkv: attention(*qkv, implementation=implementation, **arguments), q, k, v)
        return out, *pullback(g)

    results = output_and_gradients(q, k, v, g)
    assert all(x.dtype == dtype for x in results)
    # Both operands of every sum are rounded once or twice: 2^-24 and 2^-8 relative, over sums of up to 21 terms near 1;
    # the rounding of more terms adds up as their square root.
    tolerance = (1e-5 if dtype == "float32" else 6e-2) * max(1, q.shape[1] / 21) ** 0.5
    for got, wanted in zip(results, _float64(*operands, case), strict=True):
        assert np.abs(np.asarray(got, np.float64) - wanted).max() < tolerance


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("implementation", "name", "dtype"),
    [
        (implementation, name, dtype)
        for implementation in _IMPLEMENTATIONS
        for name in _CASES
        for dtype in ("float32", "bfloat16")
        # Interpreted kernels take a second each to compile; the others are below.
        if implementation != "pallas" or (name in _KERNEL_CASES and dtype == "float32") or name == "everything"
    ],
)
def test_output_and_gradients_match_float64(implementation: str, name: str, dtype: str) -> None:
    case = _case(name, 17)
    _check(_operands(**_shape(case)), case, implementation, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "dtype", "name"),
    [
        (length, dtype, name)
        for length in (1, 17, 128, 1000)
        for dtype in ("float32", "bfloat16")
        for name in _CASES
        if name not in ("cache", "fewer keys")
    ],
)
@pytest.mark.parametrize("implementation", _IMPLEMENTATIONS)
def test_any_length_matches_float64(
    implementation: str, name: str, length: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interpret(monkeypatch, None if length == 1000 else _TILES)  # None: the tiles that a GPU uses
    case = _case(name, length)
    _check(_operands(length=length, **_shape(case)), case, implementation, dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("head_dim", [32, 80, 256])
def test_any_head_dim_matches_float64(head_dim: int) -> None:
    case = _case("everything", 40)
    _check(_operands(length=40, head_dim=head_dim, **_shape(case)), case, "pallas", "float32")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", _IMPLEMENTATIONS)
def test_queries_that_see_nothing_yield_zeros_and_no_gradient(implementation: str) -> None:
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in _operands())
    kv_mask = jnp.zeros((2, 17), bool).at[1].set(True)
    arguments = {"causal": True, "kv_mask": kv_mask, "implementation": implementation}

    @jax.jit
    def output_and_gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, **arguments), q, k, v)
        return out, *pullback(jnp.ones_like(out))

    out, *gradients = output_and_gradients(q, k, v)
    assert (out[0] == 0).all() and (out[1] != 0).any()
    for gradient in gradients:
        assert (gradient[0] == 0).all() and jnp.isfinite(gradient).all()


def _any_shape(implementation: str, max_examples: int) -> Any:
    """A property test of an implementation."""

    @settings(max_examples=max_examples, deadline=None, database=None)
    @given(
        length=st.integers(1, 150),
        heads=st.sampled_from([(1, 1), (4, 2), (3, 3), (6, 1)]),
        causal=st.booleans(),
        head_dim=st.sampled_from([1, 8, 20, 32]),
        window=st.none() | st.integers(1, 160),
        documents=st.booleans(),
        keys=st.none() | st.integers(1, 150),
    )
    def check(
        length: int,
        heads: tuple[int, int],
        causal: bool,
        head_dim: int,
        window: int | None,
        documents: bool,
        keys: int | None,
    ) -> None:
        case = {"causal": causal, "window": window}
        if documents:
            keys, case["segment_ids"] = None, _segments(2, length)
        shape = {"length": length, "keys": keys, "heads": heads[0], "kv_heads": heads[1], "head_dim": head_dim}
        _check(_operands(**shape), case, implementation, "float32")

    return check


def test_any_shape_matches_float64() -> None:
    _any_shape("xla", 10)()


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_any_shape_matches_float64_in_kernels() -> None:
    _any_shape("pallas", 20)()


def test_queries_past_the_last_key_see_the_keys_before_them() -> None:
    operands = _operands(length=150, keys=20)
    _check(operands, {"causal": True}, "xla", "float32")


@pytest.mark.parametrize("case", ["causal", "full", "window", "segments", "causal padding", "grouped", "softcap"])
def test_long_sequences_walked_in_blocks_match_float64(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks of 8 queries and chunks of 24, the last of either incomplete.
    monkeypatch.setattr(xla, "MOST_QUERIES", 16)
    monkeypatch.setattr(xla, "chunk_size", lambda length, skips: 24)
    _check(_operands(**(_shape(_case(case, 61)) | {"length": 61})), _case(case, 61), "xla", "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", _CASES)
def test_a_softmax_computed_again_matches_float64(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "MOST_KEPT_KEYS", 0)
    _check(_operands(**_shape(_case(name, 17))), _case(name, 17), "xla", dtype)


def test_the_softmax_of_short_rows_alone_is_kept() -> None:
    def kept(keys: int, softcap: float | None) -> bool:
        q = jnp.zeros((1, keys, 1, 8), jnp.bfloat16)
        pullback = jax.vjp(lambda q: attention(q, q, q, causal=False, softcap=softcap, implementation="xla"), q)[1]
        return any(x.shape[-1:] == (keys,) and x.dtype == jnp.bfloat16 for x in jax.tree.leaves(pullback))

    assert kept(256, None) and not kept(257, None) and not kept(256, 1.0)


@pytest.mark.parametrize("causal", [True, False])
def test_memory_of_long_sequences_grows_with_their_length(causal: bool) -> None:
    def temporaries(length: int) -> int:
        q = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)

        def loss(q: jax.Array) -> jax.Array:
            return jnp.sum(attention(q, q, q, causal=causal, implementation="xla"))

        return jax.jit(jax.grad(loss)).lower(q).compile().memory_analysis().temp_size_in_bytes

    # Twice the length, twice the memory; its square would be four times.
    assert temporaries(8192) < 2.2 * temporaries(4096)


def test_chunks_skip_work_under_a_causal_mask() -> None:
    q = jax.ShapeDtypeStruct((1, 512, 1, 64), jnp.float32)

    def flops(causal: bool) -> float:
        return jax.jit(lambda q: attention(q, q, q, causal=causal)).lower(q).compile().cost_analysis()["flops"]

    # With chunks of 128 queries, 10 of 16 blocks remain.
    assert flops(True) < 0.66 * flops(False)


def test_an_unknown_implementation_is_an_error() -> None:
    q, k, v, _ = map(jnp.asarray, _operands())
    with pytest.raises(
        ConfigError, match="no attention implementation 'flash': choose from pallas, cudnn, xla, reference"
    ):
        attention(q, k, v, causal=True, implementation="flash")


def test_an_implementation_that_refuses_is_an_error_by_name_and_a_log_line_otherwise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    picky = Implementation("picky", reference, lambda *_: "it is Monday")
    monkeypatch.setitem(api.IMPLEMENTATIONS, "picky", picky)
    monkeypatch.setattr(api, "preference", lambda *_, **__: ("picky", "xla", "reference"))
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
        ({"q": np.zeros((17, 4, 8))}, r"\(batch, seq, heads, head_dim\), got \(17, 4, 8\) and \(2, 17, 4, 8\)"),
        ({"k": np.zeros((2, 17, 3, 8))}, "kv_heads must divide heads, got 3 for 4 heads"),
        ({"k": np.zeros((1, 17, 4, 8))}, r"k must have shape \(2, 17, 4, 8\) .*, got \(1, 17, 4, 8\)"),
        ({"v": np.zeros((2, 16, 4, 8))}, r"v must have shape \(2, 17, 4, 8\) .*, got \(2, 16, 4, 8\)"),
        ({"segment_ids": np.zeros((2, 16), int)}, r"segment_ids must have shape \(2, 17\) .*, got \(2, 16\)"),
        (
            {"segment_ids": np.zeros((2, 17), int), "kv_segment_ids": np.zeros((2, 16), int)},
            r"kv_segment_ids must have shape \(2, 17\) .*, got \(2, 16\)",
        ),
        ({"kv_segment_ids": np.zeros((2, 17), int)}, "needs segment_ids"),
        ({"kv_mask": np.zeros((17,), bool)}, r"kv_mask must have shape \(2, 17\) .*, got \(17,\)"),
        ({"query_positions": np.zeros((17,), int)}, r"query_positions must have shape \(2, 17\) .*, got \(17,\)"),
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
