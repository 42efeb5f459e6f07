"""Models with packed matrices: what they compute and decode, and their parameters as named arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ConfigError
from cramjax.kernels.packed import (
    LowRank,
    NormalFloat,
    from_arrays,
    is_packed,
    low_rank,
    pack,
    to_arrays,
    unpacked,
)
from cramjax.model import Weight
from cramjax.model.weights import Constant

from . import small


@pytest.mark.parametrize("name", ["modern", "bert", "adaptive"])
def test_a_packed_model_computes_what_its_unpacked_weights_do(name: str) -> None:
    model = small.build(name)
    params = small.trained_like(model)
    packed = pack(params, model.weights, "int8", 8, head=True)
    flat = jax.tree_util.tree_leaves_with_path(packed, is_leaf=is_packed)
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): is_packed(leaf) for path, leaf in flat}
    weights = {
        jax.tree_util.keystr(p, simple=True, separator="/"): w for p, w in jax.tree.leaves_with_path(model.weights)
    }
    assert names == {path: weight.role in ("matrix", "head") for path, weight in weights.items()}
    arrays = jax.tree.map(unpacked, packed, is_leaf=is_packed)
    tokens = small.batch()

    @jax.jit
    def run(params: Any) -> Any:
        hidden = model.hidden(params, tokens)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return model.logits(params, hidden), model.loss_sums(params, rows, tokens.reshape(-1)).total

    for got, wanted in zip(run(packed), run(arrays), strict=True):
        # The same products, of which some are summed in another order.
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_layers_of_a_packed_stack_may_be_walked_either_way() -> None:
    bare = small.build("bare")
    params = small.trained_like(bare)
    packed = pack(params, bare.weights, "int4", 8)
    arrays = jax.tree.map(unpacked, packed, is_leaf=is_packed)
    tokens = small.batch()

    def by_embedding(params: Any, walk: Any, remat: Any = "none") -> jax.Array:
        model = small.build("bare", layer_loop=walk, remat=remat)

        @jax.jit
        def gradient(params: Any) -> Any:
            return jax.grad(lambda e: jnp.sum(jnp.square(model.hidden(params | {"embed": e}, tokens))))(params["embed"])

        return gradient(params)["token"]["table"]

    wanted = by_embedding(arrays, "scan")
    for got in (by_embedding(packed, "scan", "full"), by_embedding(packed, "unroll")):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4 * float(jnp.abs(wanted).max()))


def test_weights_that_are_not_finite_are_not_packed() -> None:
    params = {"blocks": {"up": {"kernel": jnp.ones((2, 8, 4)).at[1, 2, 3].set(jnp.nan)}}}
    weights = {"blocks": {"up": {"kernel": Weight((8, 4), ("embed", "mlp"), "matrix", Constant(0.0), repeats=2)}}}
    with pytest.raises(ConfigError, match="blocks/up/kernel has weights that are not finite"):
        pack(params, weights, "int8", 8)
    with pytest.raises(ConfigError, match="blocks/up/kernel: .* 8 would do"):
        pack({"blocks": {"up": {"kernel": jnp.ones((2, 24, 4))}}}, weights, "int8", 9)


def test_bases_of_adapters_are_packed_and_shapes_too() -> None:
    model = small.build("llama")
    params = small.trained_like(model)
    out = params["blocks"]["attention"]["out"]
    out["kernel"] = low_rank(out["kernel"], 2, scale=1.0, key=jax.random.key(0))
    packed = pack(params, model.weights, "nf4", 8)
    leaf = packed["blocks"]["attention"]["out"]["kernel"]
    assert isinstance(leaf, LowRank) and isinstance(leaf.base, NormalFloat) and leaf.base.double
    np.testing.assert_array_equal(leaf.a, out["kernel"].a)
    shapes = jax.eval_shape(lambda params: pack(params, model.weights, "nf4", 8), params)
    assert jax.tree.structure(shapes) == jax.tree.structure(packed)
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (shapes, packed)]
    assert kinds[0] == kinds[1]
    with pytest.raises(ConfigError, match="kernel is packed already: start from"):
        pack(packed, model.weights, "int8", 8)
    with pytest.raises(ConfigError, match="packed as int8, int4, int3, int2, nf4, fp8, mxfp4, got 'fp4'"):
        pack(params, model.weights, "fp4")


def test_parameters_are_named_and_read_back() -> None:
    model = small.build("gpt2")
    params = small.trained_like(model)
    packed = pack(params, model.weights, "int4", 8, symmetric=False, scale_dtype="bfloat16")
    arrays = to_arrays(packed)
    assert {"embed/token/table", "blocks/mlp/up/kernel.q", "blocks/mlp/up/kernel.zero"} <= set(arrays)
    assert to_arrays(params).keys() == {name.rpartition(".")[0] or name for name in arrays}
    back = from_arrays(dict(reversed(arrays.items())))
    assert jax.tree.structure(back) == jax.tree.structure(packed)
    for got, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(packed), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)
