"""Parameters as named arrays, and back: `blocks/mlp/up/kernel`, and of a packed one `blocks/mlp/up/kernel.q`, `.scale`.

What files hold. Arrays may be of any kind: on devices, in host memory, or shapes alone.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from cramjax.errors import ModelError
from cramjax.kernels.packed.quantised import Quantised


def to_arrays(params: PyTree) -> dict[str, Any]:
    """Every array of the parameters by name, in the tree's order.

    Args:
        params: nested dicts of arrays and packed leaves.
    """
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def from_arrays(arrays: Mapping[str, Any]) -> PyTree:
    """The parameters that `to_arrays` named.

    Raises:
        ModelError: a name that is no parameter's, or parts that make no packed leaf.
    """
    leaves: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        path, dot, part = name.rpartition(".")
        if dot:
            parts.setdefault(path, {})[part] = array
        else:
            leaves[name] = array
    for path, own in parts.items():
        if path in leaves:
            raise ModelError(f"{path} is there both as an array and in parts ({', '.join(own)}): the file is damaged.")
        leaves[path] = _packed(path, own)
    params: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        place = params
        for key in above:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ModelError(f"{path} lies below a parameter: the file is damaged.")
        if not last or last in place:
            raise ModelError(f"{path!r} cannot be a parameter's name: the file is damaged.")
        place[last] = leaf
    return params


def _name(path: tuple[Any, ...]) -> str:
    steps = [jax.tree_util.keystr((step,), simple=True) for step in path]
    parts = [isinstance(step, jax.tree_util.GetAttrKey) for step in path]
    return "".join(f"{'.' if part else '/'}{step}" for step, part in zip(steps, parts, strict=True))[1:]


def _packed(path: str, parts: Mapping[str, Any]) -> Quantised:
    """A packed leaf of its parts: how many bits a code has, its type says."""
    bits = {"int8": 8, "uint8": 4}.get(str(parts["q"].dtype)) if {"q", "scale"} <= set(parts) else None
    if bits is None or not set(parts) <= {"q", "scale", "zero"}:
        found = ", ".join(f"{path}.{name} ({array.dtype})" for name, array in sorted(parts.items()))
        raise ModelError(
            f"{found}: a quantised matrix has .q (int8 or uint8), .scale and perhaps .zero, and no others."
        )
    leaf = Quantised(parts["q"], parts["scale"], parts.get("zero"), bits)
    *lead, inner, outer = leaf.shape if len(parts["q"].shape) > 1 else (0, 0)
    wanted = (*lead, max(1, parts["scale"].shape[-2] if len(parts["scale"].shape) > 1 else 1), outer)
    if inner % wanted[-2] or any(tuple(part.shape) != wanted for name, part in parts.items() if name != "q"):
        shapes = ", ".join(f"{path}.{name} {tuple(array.shape)}" for name, array in sorted(parts.items()))
        raise ModelError(f"{shapes}: these shapes do not fit one another; the file is damaged.")
    return leaf
