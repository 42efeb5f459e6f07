"""Adapters merged into the matrices that they change."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cramjax.errors import ModelError
from cramjax.kernels.dense.packed import Packed, is_adapter, unpacked
from cramjax.kernels.packed.tiled import Tiled
from cramjax.kernels.packed.virtual import Virtual


@dataclass(frozen=True)
class Merged:
    """Parameters whose adapters are merged."""

    params: PyTree
    """Without adapters. Packed bases are packed again the same way, others in the precision that they had."""
    changes: Mapping[str, float]
    """What rounding cost, by the path of each matrix that had an adapter: the length of the difference to the exact sum
    over the length of that (Frobenius), the largest of the layers."""


def merge(params: PyTree) -> Merged:
    """Every matrix that has an adapter, and its bias, as the ones that compute the same without.

    Args:
        params: nested dicts of arrays and packed leaves.

    Raises:
        ModelError: an adapter is of virtual tokens, which no weight stands for.
    """
    params = with_factors_in_biases(params)
    changes: dict[str, float] = {}

    def visit(tree: Any, path: str) -> Any:
        if isinstance(tree, Mapping):
            return {key: visit(value, f"{path}/{key}" if path else str(key)) for key, value in tree.items()}
        if isinstance(tree, Virtual):
            raise ModelError(
                f"{path} has {tree.count} virtual tokens beside it (a prompt or a prefix), which cannot be merged into "
                "weights: keep the model as it is, with them."
            )
        if not is_adapter(tree):
            return tree
        made, change = _merged(tree)
        changes[path] = float(jnp.max(change))
        return made

    return Merged(visit(params, ""), changes)


def with_factors_in_biases(params: PyTree) -> PyTree:
    """Parameters whose biases are what matrices without adapters would need: times the factors of results (IA3).

    Args:
        params: nested dicts of arrays and packed leaves, the matrices still with their adapters.
    """
    if not isinstance(params, Mapping):
        return params
    made = {key: with_factors_in_biases(value) for key, value in params.items()}
    if isinstance(params.get("kernel"), Packed) and "bias" in params:
        made["bias"] = params["kernel"].offset(params["bias"])
    return made


@jax.jit
def _merged(leaf: Any) -> tuple[Any, Float[Array, "*stack"]]:
    """The base with its adapter in it, and the relative change by rounding."""
    if leaf.ndim > 2:  # what is in between exists for one matrix at a time
        return jax.lax.map(_merged, leaf)
    exact = leaf.unpacked()
    made = leaf.base.repacked(exact) if isinstance(leaf.base, Tiled) else exact.astype(leaf.base.dtype)
    off, length = (jnp.linalg.norm(matrix) for matrix in (unpacked(made) - exact, exact))
    return made, off / jnp.where(length == 0, 1.0, length)
