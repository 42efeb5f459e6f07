"""NF4: codes and scales against their definition in NumPy and against bitsandbytes, products, and bytes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ConfigError, ModelError
from cramjax.kernels.dense import dense
from cramjax.kernels.packed import NormalFloat, from_arrays, normal_float, tiled, to_arrays
from cramjax.kernels.packed.normal_float import NF4, dynamic_map
from cramjax.kernels.packed.tiled import unpaired


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def float64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.argmin(np.abs(x[..., None] - values), axis=-1)


def defined(w: np.ndarray, block: int, mean: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The definition in float64, of the weights (out, in) one row after the other; what is stored is rounded once.

    All but the mean of the scales: a sum of float32 in an order that compilers choose is right but for its last bit.
    """
    blocks = float64(w.T).reshape(-1, block)
    absmax = np.abs(blocks).max(1)
    codes = nearest(blocks / absmax[:, None], float64(NF4))
    mean = np.float32(absmax.mean()) if mean is None else mean
    np.testing.assert_array_max_ulp(mean, np.float32(absmax.mean()), maxulp=1)
    less = np.float32(absmax) - mean
    groups = np.pad(less, (0, -len(less) % 256)).reshape(-1, 256)
    scale = np.abs(groups).max(1)
    second = nearest((float64(groups) / scale[:, None]).reshape(-1)[: len(less)], float64(dynamic_map()))
    return {"codes": codes.reshape(-1), "absmax": absmax, "mean": mean, "scale": scale, "second": second}


def by_rows(x: Any) -> np.ndarray:
    """Of (inner, outer), as numbers of (outer, inner), one row after the other."""
    return np.asarray(x).T.reshape(-1)


# Of fewer, as many and more scales than one of the second level is for, and not a multiple of it.
SHAPES = [(128, 20), (256, 64), (192, 200)]


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_of_the_definition(shape: tuple[int, int]) -> None:
    w = normal(*shape)
    single, double = (normal_float(jnp.asarray(w), 64, double) for double in (False, True))
    mean = np.asarray(double.absmax_mean)
    assert mean.shape == (1, 1)
    wanted = defined(w, 64, mean[0, 0])
    for leaf in (single, double):
        np.testing.assert_array_equal(by_rows(unpaired(leaf.nf4)), wanted["codes"])
    np.testing.assert_array_equal(by_rows(single.absmax), wanted["absmax"])
    np.testing.assert_array_equal(double.absmax_scale, wanted["scale"][None])
    np.testing.assert_array_equal(by_rows(double.absmax), wanted["second"])
    # What they stand for.
    scales = (
        float64(dynamic_map())[wanted["second"]] * np.repeat(float64(wanted["scale"]), 256)[: len(wanted["second"])]
    )
    scales = scales + float64(mean[0, 0])
    for leaf, own in ((single, wanted["absmax"]), (double, scales)):
        stored = (float64(NF4)[wanted["codes"]].reshape(-1, 64) * own[:, None]).reshape(shape[::-1]).T
        np.testing.assert_allclose(leaf.unpacked(), stored, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_bitsandbytes(shape: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    w = normal(*shape, seed=1)
    leaf = normal_float(jnp.asarray(w))
    theirs, state = functional.quantize_4bit(
        torch.from_numpy(np.ascontiguousarray(w.T)), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    raw = theirs.numpy().reshape(-1)
    np.testing.assert_array_equal(by_rows(unpaired(leaf.nf4)), np.stack([raw >> 4, raw & 15], 1).reshape(-1))
    np.testing.assert_array_equal(dynamic_map(), state.state2.code.numpy())
    # Their library does not find the nearest code of a scale where the next is almost as near; ours is never further.
    scales, code = defined(w, 64), float64(dynamic_map())
    exact = (float64(scales["absmax"]) - scales["mean"]) / np.repeat(scales["scale"], 256)[: len(scales["absmax"])]
    ours, their = by_rows(leaf.absmax), state.absmax.numpy()
    further = np.abs(exact - code[their]) - np.abs(exact - code[ours])
    assert (ours != their).mean() < 0.005 and further.min() > -5e-7 and further.max() < 1e-5
    # Their mean is summed in float32.
    np.testing.assert_allclose(leaf.absmax_mean.reshape(()), state.offset.numpy(), rtol=2e-7)
    np.testing.assert_allclose(leaf.absmax_scale[0], state.state2.absmax.numpy(), rtol=2e-6)
    back = functional.dequantize_4bit(theirs, state).numpy().T
    same = np.repeat((ours == their).reshape(shape[1], -1).T, 64, axis=0)
    np.testing.assert_allclose(np.asarray(leaf.unpacked())[same], back[same], rtol=2e-6, atol=1e-7)


def test_the_error_is_the_published_one() -> None:
    w = jnp.asarray(normal(64 * 64, 64))
    single, double = (normal_float(w, 64, double).unpacked() - w for double in (False, True))
    assert jnp.sqrt(jnp.mean(single**2)) == pytest.approx(0.0920, rel=0.01)
    assert jnp.sqrt(jnp.mean(double**2)) == pytest.approx(0.0920, rel=0.01)  # scales of 8 bits cost almost nothing


def test_values_are_the_quantiles_of_a_normal_distribution() -> None:
    """Appendix E: means of neighbouring quantiles would be zero twice; so each side has its own, and zero is exact."""
    from scipy.stats import norm

    positive, negative = (norm.ppf(np.linspace(0.9677083, 0.5, n)[:-1]) for n in (9, 8))
    values = np.sort(np.concatenate([positive, [0], -negative]))
    np.testing.assert_allclose(NF4, values / values.max(), atol=1e-6)
    # The map of scales has 255 values of which 127 pairs differ in sign alone, and 1.
    code = dynamic_map()
    assert len(code) == 256 and (np.diff(code) > 0).all()
    np.testing.assert_array_equal(code[code < 0], -code[code > 0][:-1][::-1])


def test_blocks_of_zeros_and_bytes() -> None:
    w = jnp.asarray(normal(2, 128, 24)).at[:, 64:, 3].set(0.0)
    for double, extra in ((False, 4), (True, 1)):
        leaf = normal_float(w, 64, double)
        assert np.isfinite(leaf.unpacked()).all() and not leaf.unpacked()[:, 64:, 3].any()
        assert leaf.bytes == 2 * (128 * 24 // 2 + 2 * 24 * extra + 8 * double)
        assert (leaf.shape, leaf.dtype, leaf.block, leaf.double) == ((2, 128, 24), jnp.float32, 64, double)
    # QLoRA's 0.127 bits a weight of scales.
    leaf = jax.eval_shape(normal_float, jax.ShapeDtypeStruct((4096, 4096), jnp.float32))
    assert 8 * leaf.bytes / 4096**2 - 4 == pytest.approx(0.127, abs=5e-4)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("tile", [4 << 20, 1024])
@pytest.mark.parametrize("rows", [3, 150])  # tiles are along the inputs, or with many rows outputs
def test_products_and_gradients_match_float64(
    double: bool, tile: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "_TILE", tile)
    leaf = normal_float(jnp.asarray(normal(96, 20)), 16, double)
    x, g = normal(rows, 96, seed=1), normal(rows, 20, seed=2)
    y, pull = jax.vjp(jax.jit(lambda x: dense(x, leaf)), jnp.asarray(x))
    matrix = float64(leaf.unpacked())
    np.testing.assert_allclose(y, float64(x) @ matrix, rtol=0, atol=2e-5)
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], float64(g) @ matrix.T, rtol=0, atol=2e-5)


def test_stacked_leaves_are_packed_one_by_one_and_scanned() -> None:
    w, x = jnp.asarray(normal(3, 64, 8)), jnp.asarray(normal(4, 64, seed=1))
    leaf = normal_float(w, 32)
    for index in range(3):
        for part, alone in zip(jax.tree.leaves(leaf[index]), jax.tree.leaves(normal_float(w[index], 32)), strict=True):
            np.testing.assert_array_equal(part, alone)
    scanned = jax.lax.scan(lambda carry, w: (carry, dense(x, w)), None, leaf)[1]
    np.testing.assert_allclose(scanned, float64(x) @ float64(leaf.unpacked()), rtol=0, atol=1e-5)
    # What codes stand for is packed into the same codes, but where a block's largest weight is 1 in the middle of both.
    again = leaf.repacked(normal_float(w, 32, False).unpacked())
    np.testing.assert_array_equal(unpaired(again.nf4), unpaired(leaf.nf4))
    assert (again.block, again.double) == (32, True)


def test_parts_are_named_and_read_back() -> None:
    for double in (False, True):
        params = {"up": {"kernel": normal_float(jnp.asarray(normal(2, 64, 8)), 32, double)}}
        arrays = to_arrays(params)
        assert ("up/kernel.absmax_mean" in arrays) == double
        back = from_arrays(arrays)
        assert isinstance(back["up"]["kernel"], NormalFloat)
        assert jax.tree.structure(back) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k.nf4": np.zeros((32, 8), np.int8)}, r"k\.nf4 \(int8\)"),
        ({"k.absmax": np.zeros((2, 8), np.float32)}, r"k\.absmax \(float32\)"),
        ({"k.absmax_scale": None}, r"k\.absmax_mean \(float32\).* a quantised matrix has"),
        ({"k.absmax": np.zeros((3, 8), np.uint8)}, "do not fit one another"),
        ({"k.absmax_scale": np.zeros((1, 2), np.float32)}, "do not fit one another"),
        ({"k.absmax_mean": np.zeros((), np.float32)}, "do not fit one another"),
    ],
)
def test_parts_that_make_none_are_said(change: dict[str, Any], words: str) -> None:
    arrays = to_arrays({"k": normal_float(jnp.asarray(normal(64, 8)), 32)}) | change
    with pytest.raises(ModelError, match=words):
        from_arrays({name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    ("shape", "block", "words"),
    [((96, 8), 64, "divide the 96 inputs .* got 64: 48 would do"), ((33, 8), 11, "this matrix has 33: use int8")],
)
def test_what_cannot_be_packed_is_said(shape: tuple[int, int], block: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        normal_float(jnp.ones(shape), block)
