"""The public function, and which implementation computes it where.

XLA's `ragged_dot` is for TPUs: on CPUs it multiplies all rows with every matrix, 8 to 46 times a dense product's time,
and on NVIDIA cards it has been lowered to the same since jax 0.9. `benchmarks/experts.py` measures it here.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cramjax import devices
from cramjax.kernels.choice import Implementation, choose, never
from cramjax.kernels.dense.packed import Packed
from cramjax.kernels.grouped.groups import Groups
from cramjax.kernels.grouped.reference import reference
from cramjax.kernels.grouped.ways import BATCHED, LOOP, RAGGED, SCAN, Way

_WAYS: dict[str, Way] = {"batched": BATCHED, "loop": LOOP, "scan": SCAN, "ragged": RAGGED}


def _compute(name: str) -> Any:
    def compute(x: Array, w: Any, groups: Groups, dtype: Any) -> Array:
        return _product(name, jnp.dtype(dtype), x.astype(dtype), w, groups)

    return compute


def _refusal(w: Any, groups: Groups) -> str | None:
    del groups
    return "it multiplies with arrays, and the matrices are packed" if isinstance(w, Packed) else None


def _batched_refusal(w: Any, groups: Groups) -> str | None:
    return _refusal(w, groups) if groups.even else "groups have different numbers of rows"


IMPLEMENTATIONS = {
    each.name: each
    for each in (
        Implementation("batched", _compute("batched"), _batched_refusal),
        Implementation("loop", _compute("loop"), never),
        Implementation("scan", _compute("scan"), _refusal),
        Implementation("ragged", _compute("ragged"), _refusal),
        Implementation("reference", reference, never),
    )
}


def preference(platform: str) -> tuple[str, ...]:
    """Names of the implementations in the order in which they are tried.

    Args:
        platform: of the device: cpu, gpu or tpu.
    """
    return {
        "cpu": ("batched", "loop", "scan", "ragged", "reference"),
        "tpu": ("ragged", "batched", "loop", "scan", "reference"),
    }.get(platform, ("batched", "scan", "loop", "ragged", "reference"))


def grouped(
    x: Float[Array, "rows inner"],
    w: Float[Array, "groups inner outer"] | Packed,
    groups: Groups,
    *,
    dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> Float[Array, "rows outer"]:
    """Multiply each group of rows with its matrix.

    Args:
        x: sorted rows (rows, inner), as of `dispatch`: those of nobody are 0.
        w: a matrix for each group (groups, inner, outer), in any precision, rounded to `dtype` for the product; its
            gradient is summed in float32. Packed ones are constants, and have none.
        groups: of the rows.
        dtype: precision of the operands and of the result. Sums are float32.
        implementation: one of `IMPLEMENTATIONS`. Default: the first that can run, in the order of `preference`.

    Returns:
        The products (rows, outer) in `dtype`. Rows of nobody mean nothing.

    Raises:
        ValueError: shapes that do not fit together.
        ConfigError: the implementation asked for does not exist or cannot run here.
    """
    if x.shape[0] != groups.rows or w.shape != (groups.count, x.shape[1], w.shape[2]):
        raise ValueError(
            f"x must have shape ({groups.rows}, inner) and w ({groups.count}, inner, outer), got {x.shape}, {w.shape}"
        )
    if isinstance(w, Packed) and (own := w.multiply_groups(x, groups, dtype)) is not None:
        return own
    x = w.read(x) if isinstance(w, Packed) else x
    ordered = [IMPLEMENTATIONS[name] for name in preference(devices.target().platform)]
    return choose("grouped product", ordered, implementation, w, groups).compute(x, w, groups, dtype)


def outer_products(x: Float[Array, "rows inner"], groups: Groups) -> Float[Array, "groups inner inner"]:
    """Of each group, the sum of its rows' outer products with themselves, in float32 throughout.

    Args:
        x: sorted rows; those of nobody are 0.
        groups: of the rows.
    """

    def block(sums: Array, item: tuple[Array, Array]) -> tuple[Array, None]:
        rows, which = item
        return sums.at[which].add(jnp.matmul(rows.T, rows, precision="highest")), None

    blocks = x.astype(jnp.float32).reshape(groups.blocks, groups.block, -1)
    empty = jnp.zeros((groups.count, x.shape[1], x.shape[1]), jnp.float32)
    return jax.lax.scan(block, empty, (blocks, groups.group_of_block))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(name: str, dtype: Any, x: Array, w: Any, groups: Groups) -> Array:
    return _WAYS[name].multiply(x, _rounded(w, dtype), groups, False)


def _forward(name: str, dtype: Any, x: Array, w: Any, groups: Groups) -> tuple[Array, tuple[Array, Any, Groups]]:
    return _product(name, dtype, x, w, groups), (x, w, groups)


def _backward(
    name: str, dtype: Any, residuals: tuple[Array, Any, Groups], g: Array
) -> tuple[Array, Array | None, None]:
    x, w, groups = residuals
    way, g = _WAYS[name], g.astype(dtype)
    by_x = way.multiply(g, _rounded(w, dtype), groups, True)
    return by_x, None if isinstance(w, Packed) else way.gradient(x, g, groups).astype(w.dtype), None


_product.defvjp(_forward, _backward)


def _rounded(w: Any, dtype: Any) -> Any:
    return w if isinstance(w, Packed) else w.astype(dtype)
