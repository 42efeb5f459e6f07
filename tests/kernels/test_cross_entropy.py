"""Cross entropy kernels against the definition in float64 numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cramjax.kernels.cross_entropy import cross_entropy, cross_entropy_sum, fused

_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "z-loss": {"z_loss": 0.3},
    "padded": {"vocab_size": 29},
    "all": {"softcap": 3.0, "z_loss": 0.1, "vocab_size": 31},
}

# Bytes: some thirty tokens of the vocabulary below.
_SMALL_TILE = 4 << 10


def _operands(tokens: int = 12, embed: int = 6, vocab: int = 33):
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(tokens, embed)),
        rng.normal(size=(embed, vocab)),
        rng.integers(0, vocab - 4, tokens),
        rng.random(tokens) * (rng.random(tokens) < 0.7),
        rng.normal(size=vocab),
    )


def _float64(
    hidden: np.ndarray,
    weight: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    bias: np.ndarray,
    softcap: float | None = None,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
):
    """Per-token loss and penalty, and gradients of their weighted sum: of logits, hidden, weight and bias."""
    raw = hidden @ weight + bias
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    logits = np.where(np.arange(weight.shape[1]) < (vocab_size or weight.shape[1]), logits, -np.inf)
    rows = np.arange(len(targets))
    z = np.log(np.exp(logits).sum(1))
    g = np.exp(logits - z[:, None]) * (1 + 2 * z_loss * z)[:, None]
    g[rows, targets] -= 1
    g *= weights[:, None]
    if softcap is not None:
        g *= 1 - np.square(np.tanh(raw / softcap))
    correct = logits.argmax(1) == targets
    return z - logits[rows, targets], z_loss * z**2, correct, g, g @ weight.T, hidden.T @ g, g.sum(0)


@pytest.mark.parametrize("name", _OPTIONS)
def test_each_token_matches_float64(name: str) -> None:
    hidden, weight, targets, weights, bias = _operands()
    each = cross_entropy(
        jnp.float32(hidden), jnp.float32(weight), jnp.asarray(targets), bias=jnp.float32(bias), **_OPTIONS[name]
    )
    nll, penalty, correct, *_ = _float64(hidden, weight, targets, weights, bias, **_OPTIONS[name])
    np.testing.assert_allclose(each.nll, nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(each.penalty, penalty, rtol=1e-5)
    assert (np.asarray(each.correct) == correct).all()


def _check(operands: Any, options: dict[str, Any], dtype: str = "float32") -> None:
    """Compare sums and gradients with those by the definition."""
    # As in training: the head's matrix is float32, and is rounded to the type of its inputs.
    hidden, weight = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in operands[:2])
    targets, weights, bias = operands[2:]

    def total(hidden: Any, weight: Any, bias: Any) -> Any:
        sums = cross_entropy_sum(hidden, weight, jnp.asarray(targets), jnp.float32(weights), bias=bias, **options)
        return 1.5 * sums.total, sums

    @jax.jit
    def gradients_and_sums(*arguments: jax.Array) -> Any:
        return *jax.grad(total, (0, 1, 2), has_aux=True)(*arguments), total(*arguments)[1]

    differentiable = (jnp.asarray(hidden, dtype), jnp.float32(weight), jnp.float32(bias))
    gradients, sums, undifferentiated = gradients_and_sums(*differentiable)
    nll, penalty, correct, g, *wanted = _float64(hidden, weight, targets, weights, bias, **options)
    sizes = np.abs(g) @ np.abs(weight.T), np.abs(hidden.T) @ np.abs(g), np.abs(g).sum(0)
    for got in (sums, undifferentiated):
        # Products of rounded operands are exact; sums are float32, of terms near 1.
        near = {"rtol": 1e-5, "atol": 1e-5}
        np.testing.assert_allclose(got.nll, (nll * weights).sum(), **near)
        np.testing.assert_allclose(got.penalty, (penalty * weights).sum(), **near)
        np.testing.assert_allclose(got.total, ((nll + penalty) * weights).sum(), **near)
        np.testing.assert_allclose(got.correct, (correct * weights).sum(), **near)
    assert [x.dtype for x in gradients] == [dtype, "float32", "float32"]
    # Three roundings to nearest, by at most 2^-8 each in bfloat16: of the logits' gradient, of the sum, and of its
    # product with 1.5; a result is off by no more than that of its terms' sizes. 1 - tanh^2 and powers are float32.
    rounding = 0 if dtype == "float32" else 3 * 2**-8
    for mine, reference, size in zip(gradients, wanted, sizes, strict=True):
        error = np.abs(np.asarray(mine, np.float64) - 1.5 * reference)
        assert (error <= 1.5 * (rounding * size + 2**-18 * (1 + size))).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("name", _OPTIONS)
def test_sums_and_gradients_match_float64(name: str, tiles: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "tile_count", lambda *_, **__: tiles)
    _check(_operands(), _OPTIONS[name], dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("tokens", [1, 17, 128, 1000])
def test_any_length_matches_float64(tokens: int, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_CPU_TILE", _SMALL_TILE)
    assert fused.tile_count(tokens, 33, 4, None) == {1: 1, 17: 1, 128: 8, 1000: 40}[tokens]
    _check(_operands(tokens), _OPTIONS[name], dtype)


@settings(max_examples=8, deadline=None, database=None)
@given(tokens=st.integers(1, 60), embed=st.integers(1, 40), vocab=st.integers(5, 90), softcap=st.none() | st.just(4.0))
def test_any_shape_matches_float64(tokens: int, embed: int, vocab: int, softcap: float | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_CPU_TILE", _SMALL_TILE)
        _check(_operands(tokens, embed, vocab), {"softcap": softcap})


def test_tokens_of_weight_0_give_no_loss_and_no_gradient() -> None:
    hidden, weight, targets, *_ = (jnp.asarray(x, jnp.float32) for x in _operands())
    targets = targets.astype(jnp.int32)

    def total(hidden: Any, weight: Any) -> Any:
        return cross_entropy_sum(hidden, weight, targets, jnp.zeros(12), z_loss=0.1).total

    loss, gradients = jax.value_and_grad(total, (0, 1))(hidden, weight)
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": (7, 33)}, r"\(embed, vocab\), got \(12, 6\) and \(7, 33\)"),
        ({"hidden": (3, 4, 6)}, r"\(tokens, embed\) and .*, got \(3, 4, 6\) and \(6, 33\)"),
        ({"targets": (1,)}, r"targets must have shape \(12,\) for hidden of shape \(12, 6\).*, got \(1,\)"),
        ({"token_weights": (3, 4)}, r"token_weights must have shape \(12,\) .*, got \(3, 4\)"),
        ({"bias": (32,)}, r"bias must have shape \(33,\) .* weight of shape \(6, 33\), got \(32,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    change: dict[str, tuple[int, ...]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a user runs it, without the checks that the test suite puts around annotated functions.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    shapes = {"hidden": (12, 6), "weight": (6, 33), "targets": (12,), **change}
    operands = {name: jnp.zeros(shape, "int32" if name == "targets" else "float32") for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        cross_entropy_sum(**operands)


def test_a_tied_head_gets_its_gradient_transposed() -> None:
    hidden, weight, targets, *_ = (jnp.asarray(x, jnp.float32) for x in _operands())
    targets = targets.astype(jnp.int32)
    tied = jax.grad(lambda table: cross_entropy_sum(hidden, table.T, targets).total)(weight.T)
    untied = jax.grad(lambda w: cross_entropy_sum(hidden, w, targets).total)(weight)
    np.testing.assert_allclose(tied, untied.T, atol=1e-5)


def test_padding_gets_no_probability_and_no_gradient() -> None:
    hidden, weight, targets, *_ = (jnp.asarray(x, jnp.float32) for x in _operands())
    weight = weight.at[:, 30:].set(100.0)
    gradient = jax.grad(lambda w: cross_entropy_sum(hidden, w, targets.astype(jnp.int32), vocab_size=30).total)(weight)
    assert (gradient[:, 30:] == 0).all()
    assert (gradient[:, :30] != 0).any()


@pytest.mark.parametrize("size", [1.0, 1e3, 1e4])
def test_large_logits_do_not_overflow(size: float) -> None:
    hidden, weight, targets, *_ = (jnp.asarray(x, jnp.float32) for x in _operands())
    total, gradient = jax.value_and_grad(lambda h: cross_entropy_sum(h, weight, targets.astype(jnp.int32)).total)(
        size * hidden
    )
    assert jnp.isfinite(total) and jnp.isfinite(gradient).all()


def test_bfloat16_inputs_give_float32_sums() -> None:
    hidden, weight, targets, weights, bias = _operands()
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, weight)]
    sums = cross_entropy_sum(rounded[0], rounded[1].astype(jnp.float32), jnp.asarray(targets), jnp.float32(weights))
    exact = [np.asarray(x, np.float64) for x in rounded]
    nll, *_ = _float64(*exact, targets, weights, 0 * bias)
    assert sums.total.dtype == jnp.float32
    np.testing.assert_allclose(sums.total, (nll * weights).sum(), rtol=1e-5)  # products are exact, sums are float32


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 100_000),
    vocab=st.integers(1, 300_000),
    memory=st.none() | st.integers(1 << 30, 141 << 30),
)
def test_tiles_are_as_small_as_memory_asks_whatever_the_tokens(tokens: int, vocab: int, memory: int | None) -> None:
    size = 4 if memory is None else 2
    limit = 32 << 20 if memory is None else max(memory // 16, 8192 * 2 * vocab)
    count = fused.tile_count(tokens, vocab, size, memory)
    whole_rows = -(-tokens // count) - 1  # a tile's last row may reach over the limit
    assert count <= tokens and whole_rows * size * vocab <= limit


@pytest.mark.parametrize("tokens", [17, 23])
def test_tokens_that_no_number_of_tiles_divides_are_filled_up(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "tile_count", lambda *_: 5)
    _check(_operands(tokens), {"softcap": 3.0, "z_loss": 0.1})


def test_a_token_left_out_may_lie_among_the_padding() -> None:
    hidden, weight = jnp.ones((2, 3)), jnp.ones((3, 8))
    sums = cross_entropy_sum(hidden, weight, jnp.array([6, 2]), jnp.array([0.0, 1.0]), vocab_size=5)
    assert sums.nll == pytest.approx(np.log(5), abs=1e-6)


def test_tiles_bound_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_CPU_TILE", 1 << 20)
    tokens, vocab = 1024, 4096

    def step(hidden: Any, weight: Any, targets: Any) -> Any:
        return jax.grad(lambda h, w: cross_entropy_sum(h, w, targets).total, (0, 1))(hidden, weight)

    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((tokens, 8), "f4"), ((8, vocab), "f4"), ((tokens,), "i4"))]
    used = jax.jit(step).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert used < 4 * (1 << 20) < 4 * tokens * vocab


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.usefixtures("on_an_h100")
def test_logits_of_a_gpu_are_rounded_once(name: str, tiles: int, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "tile_count", lambda *_, **__: tiles)
    hidden, weight, targets, weights, bias = _operands()
    hidden, weight = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (hidden, weight))
    options = _OPTIONS[name]

    def total(hidden: Any, weight: Any, bias: Any) -> Any:
        weight = weight.T if tied else weight
        given = (hidden, weight, jnp.asarray(targets), jnp.float32(weights))
        sums = cross_entropy_sum(*given, bias=bias, tied=tied, **options)
        return 1.5 * sums.total, sums

    arguments = jnp.bfloat16(hidden), jnp.float32(weight.T if tied else weight), jnp.float32(bias)
    gradients, sums = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*arguments)
    nll, penalty, correct, g, *wanted = _float64(hidden, weight, targets, weights, bias, **options)
    # A logit is rounded to bfloat16 by at most 2^-8 of it, the product that it is; a soft-cap only shrinks that. A loss
    # changes by at most twice the largest change of a logit, and so does the logarithm of a probability.
    shift = 2 * 2**-8 * np.abs(hidden @ weight).max(1)
    assert sums.total.dtype == jnp.float32
    z_loss, z = options.get("z_loss", 0.0), np.sqrt(penalty / max(options.get("z_loss", 0.0), 1e-9))
    slope = 1 + 2 * z_loss * (z + shift)
    assert abs(float(sums.nll) - nll @ weights) <= shift @ weights + 1e-5
    assert abs(float(sums.total) - (nll + penalty) @ weights) <= (shift * slope) @ weights + 1e-5
    assert abs(float(sums.nll) - nll @ weights) > 0  # they are rounded
    near = np.partition((hidden @ weight + bias)[:, : options.get("vocab_size")], -2, axis=1)
    clear = near[:, -1] - near[:, -2] > 2 * shift  # rounding cannot change which logit is the greatest
    assert abs(float(sums.correct) - (correct * weights).sum()) <= weights[~clear].sum() + 1e-5
    # The gradient by a logit: its probability is off by expm1(shift) of it, and 1 - tanh² by less.
    a = np.abs
    powers = a(g) + np.eye(33)[targets] * weights[:, None]
    by_logits = 2 * (np.expm1(shift) * slope)[:, None] * powers
    bounds = by_logits @ a(weight.T), a(hidden.T) @ by_logits, by_logits.sum(0)
    # Then three roundings as on a CPU: of the logits' gradient, of the sum, and of its product with 1.5.
    sizes = a(g) @ a(weight.T), a(hidden.T) @ a(g), a(g).sum(0)
    assert [x.dtype for x in gradients] == ["bfloat16", "float32", "float32"]
    gradients = gradients[0], gradients[1].T if tied else gradients[1], gradients[2]
    for mine, reference, bound, size in zip(gradients, wanted, bounds, sizes, strict=True):
        error = a(np.asarray(mine, np.float64) - 1.5 * reference)
        assert (error <= 1.5 * (bound + 3 * 2**-8 * size + 2**-18 * (1 + size))).all()


@pytest.mark.usefixtures("on_an_h100")
def test_evaluation_on_a_gpu_has_float32_logits() -> None:
    hidden, weight, targets, weights, bias = _operands()
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (hidden, weight)]
    sums = cross_entropy_sum(
        jnp.bfloat16(hidden),
        jnp.float32(rounded[1]),
        jnp.asarray(targets),
        jnp.float32(weights),
        bias=jnp.float32(bias),
    )
    nll, *_ = _float64(*rounded, targets, weights, bias.astype(np.float32).astype(np.float64))
    np.testing.assert_allclose(sums.nll, nll @ weights, rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "vocab", "itemsize", "memory", "count"),
    [
        (16 * 1024, 50304, 2, 80 << 30, 1),  # gpt-124m on an H100: 1.6 GB of logits, of 5 GB
        (64 * 1024, 50304, 2, 80 << 30, 2),
        (64 * 1024, 32768, 2, 24 << 30, 4),  # of 4 GiB, on an RTX 4090
        (64 * 1024, 50304, 2, 8 << 30, 8),  # a small card: at least 8192 rows a tile
        (12 * 1000, 50304, 2, 8 << 30, 2),
        (8192, 256000, 4, 8 << 30, 1),
        (2048, 50304, 4, None, 16),  # a CPU: 32 MiB of 393
    ],
)
def test_tiles_are_as_few_as_memory_allows(
    tokens: int, vocab: int, itemsize: int, memory: int | None, count: int
) -> None:
    assert fused.tile_count(tokens, vocab, itemsize, memory) == count


def test_tiles_of_tokens_without_weight_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would not be a number in them does not show."""
    monkeypatch.setattr(fused, "tile_count", lambda *_, **__: 3)
    hidden, weight, targets, _, _ = _operands()
    weights = np.zeros(12)
    weights[[1, 4, 7, 10]] = 1.0
    spoilt = np.where(weights[:, None] > 0, hidden, np.nan)

    def total(hidden: Any, weight: Any) -> Any:
        return cross_entropy_sum(hidden, weight, jnp.asarray(targets), jnp.asarray(weights, jnp.float32)).total

    found, expected = (
        jax.value_and_grad(total, argnums=(0, 1))(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32))
        for x in (spoilt, hidden)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
