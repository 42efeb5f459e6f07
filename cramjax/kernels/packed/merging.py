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
    changes: dict[str, float] = {}

    def visit(tree: Any, path: str) -> Any:
        if isinstance(tree, Mapping):
            made = {key: visit(value, f"{path}/{key}" if path else str(key)) for key, value in tree.items()}
            if isinstance(tree.get("kernel"), Packed) and "bias" in tree:
                made["bias"] = tree["kernel"].offset(tree["bias"])
            return made
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


@jax.jit
def _merged(leaf: Any) -> tuple[Any, Float[Array, "*stack"]]:
    """The base with its adapter in it, and the relative change by rounding."""
    if leaf.ndim > 2:  # what is in between exists for one matrix at a time
        return jax.lax.map(_merged, leaf)
    exact = leaf.unpacked()
    made = leaf.base.repacked(exact) if isinstance(leaf.base, Tiled) else exact.astype(leaf.base.dtype)
    off, length = (jnp.linalg.norm(matrix) for matrix in (unpacked(made) - exact, exact))
    return made, off / jnp.where(length == 0, 1.0, length)
