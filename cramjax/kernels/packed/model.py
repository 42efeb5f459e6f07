"""A model's matrices, packed by a walk over its parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from cramjax.errors import ConfigError
from cramjax.kernels.packed.quantised import Quantised, quantise


def pack(
    params: PyTree,
    weights: PyTree,
    bits: int = 8,
    group: int | None = 64,
    *,
    head: bool = False,
    symmetric: bool = True,
    scale_dtype: DTypeLike = jnp.float32,
) -> PyTree:
    """Parameters with every matrix rounded to the nearest codes. Embeddings, norms, biases and scalars stay.

    Args:
        params: all parameters.
        weights: what they are: a tree of the same structure, whose leaves have a `role`.
        bits: of a weight: 8 or 4.
        group: inputs that share a scale; null: all. Narrower matrices are one group.
        head: pack the matrix to the vocabulary as well, where it is not the embedding.
        symmetric: see `quantise`.
        scale_dtype: see `quantise`.

    Raises:
        ConfigError: a matrix that cannot be packed so, by name.
    """
    roles = ("matrix", "head") if head else ("matrix",)

    def packed(path: Any, weight: Any, leaf: Any) -> Any:
        if weight.role not in roles:
            return leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        fitting = None if group is None else min(group, leaf.shape[-2])
        try:
            made: Quantised = quantise(leaf, bits, fitting, symmetric=symmetric, scale_dtype=scale_dtype)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        if not jnp.isfinite(made.scale.astype(jnp.float32)).all():
            raise ConfigError(
                f"{name} has weights that are not finite, which no code stands for: mend the model first."
            )
        return made

    return jax.tree_util.tree_map_with_path(packed, weights, params)
