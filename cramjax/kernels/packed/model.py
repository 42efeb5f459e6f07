"""A model's matrices, packed by a walk over its parameters."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PyTree

from cramjax.errors import ConfigError
from cramjax.kernels.dense.packed import Packed, is_adapter
from cramjax.kernels.packed.floats import float8, microscaled
from cramjax.kernels.packed.normal_float import normal_float
from cramjax.kernels.packed.quantised import quantise
from cramjax.kernels.packed.tiled import Tiled

Kind = Literal["int8", "int4", "int3", "int2", "nf4", "fp8", "mxfp4"]

_MAKERS: Mapping[str, Callable[..., Tiled]] = {
    "int8": lambda w, group, **options: quantise(w, 8, group, **options),
    "int4": lambda w, group, **options: quantise(w, 4, group, **options),
    "int3": lambda w, group, **options: quantise(w, 3, group, **options),
    "int2": lambda w, group, **options: quantise(w, 2, group, **options),
    "nf4": normal_float,
    "fp8": float8,
    "mxfp4": microscaled,
}


def pack(
    params: PyTree, weights: PyTree, kind: str = "int8", group: int | None = 64, *, head: bool = False, **options: Any
) -> PyTree:
    """Parameters with every matrix rounded to the nearest codes. Embeddings, norms, biases and scalars stay; of a
    matrix with an adapter, its base is packed.

    Args:
        params: all parameters, or shapes of them that are traced.
        weights: what they are: a tree of the same structure, whose leaves have a `role`.
        kind: one of `Kind`: `int8`, `int4`, `int3` or `int2` (`quantise`), `nf4` (`normal_float`), `fp8` (`float8`) or
            `mxfp4` (`microscaled`, in groups of 32).
        group: inputs that share a scale; null: all. Narrower matrices are one group.
        head: pack the matrix to the vocabulary as well, where it is not the embedding.
        options: others of these functions.

    Raises:
        ConfigError: a matrix that cannot be packed so, by name; or another kind.
    """
    if kind not in _MAKERS:
        raise ConfigError(f"Matrices are packed as {', '.join(_MAKERS)}, got {kind!r}.")
    roles = ("matrix", "head") if head else ("matrix",)

    def packed(path: Any, weight: Any, leaf: Any) -> Any:
        if weight.role not in roles:
            return leaf
        if is_adapter(leaf):
            return replace(leaf, base=packed(path, weight, leaf.base))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, Packed):
            raise ConfigError(f"{name} is packed already: start from the model that it was packed from.")
        fitting = leaf.shape[-2] if group is None else min(group, leaf.shape[-2])
        try:
            made = _MAKERS[kind](leaf, fitting, **options)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        known = [part for part in jax.tree.leaves(made) if not isinstance(part, Tracer)]
        if not all(jnp.isfinite(part).all() for part in known if jnp.issubdtype(part.dtype, jnp.floating)):
            raise ConfigError(
                f"{name} has weights that are not finite, which no code stands for: mend the model first."
            )
        return made

    return jax.tree_util.tree_map_with_path(packed, weights, params)
