"""How devices share parameters, from the logical axes that these were declared with (`cramjax.axes`).

The optimizer's copies of a parameter (moments, averages) end in its path and are divided like it. All else is
replicated: norms, biases, scalars, counters, keys. How much of a training state is divided is the stage of ZeRO.
"""

import functools
import logging
import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from cramjax.axes import MESH_AXES, SHARD_AXIS, divided_axis
from cramjax.kernels.packed import Packed, is_adapter, is_packed
from cramjax.model.weights import Weight

_log = logging.getLogger(__name__)


def param_shardings(mesh: Mesh, tree: PyTree, weights: PyTree) -> PyTree:
    """Shardings of parameters, or of any tree that holds them or copies of them, such as a whole training state.

    One axis of each parameter is divided over a mesh axis: the largest of those that are mapped to it and that it
    divides. Where it divides none, the array is replicated, and a warning says so once. The parts of a packed matrix
    are divided alike, or each by itself where one of them cannot be; those of an adapter are each by itself.

    Args:
        mesh: Axes `data` and `fsdp`, as `make_mesh` makes them.
        tree: Arrays or `ShapeDtypeStruct`s.
        weights: Declarations of the parameters (`Model.weights`).

    Returns:
        A tree of the same structure, of `NamedSharding`s.
    """
    declared = jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_packed)
    # The parts of an adapter are divided as the matrix that they change.
    named = {_name(path): weight.base if is_packed(weight) else weight for path, weight in declared}

    def sharding(path: tuple[object, ...], leaf: jax.Array | jax.ShapeDtypeStruct | Packed) -> PyTree:
        # Steps into an adapter, or into the tuples that an optimizer's state is, are no part of a parameter's path.
        keys = _name(tuple(step for step in path if not isinstance(step, jax.tree_util.GetAttrKey))).split("/")
        ends = ("/".join(keys[start:]) for start in range(len(keys)))
        name = next((end for end in ends if end in named), None)
        if name is None:
            return jax.tree.map(lambda _: replicated(mesh), leaf)
        parts, structure = jax.tree.flatten(leaf)
        alike = _spec(mesh, named[name], (leaf.shape, *(part.shape for part in parts)))
        specs = [_spec(mesh, named[name], (part.shape,)) if alike is None else alike for part in parts]
        if all(spec is None for spec in specs):
            _warn_once(name, leaf.shape, mesh.shape[SHARD_AXIS])
        return structure.unflatten([NamedSharding(mesh, spec or PartitionSpec()) for spec in specs])

    return jax.tree_util.tree_map_with_path(
        sharding, tree, is_leaf=lambda leaf: is_packed(leaf) and not is_adapter(leaf)
    )


class StateSharding(NamedTuple):
    """How the `fsdp` axis shares what a step works on: trees of shardings, one for each parameter or array of state."""

    params: PyTree
    """Parameters between steps."""
    gradients: PyTree
    """Gradients, and the sums that they are accumulated in."""
    update: PyTree
    """Parameters and gradients while the optimizer updates its share of them."""


def zero_shardings(mesh: Mesh, params: PyTree, weights: PyTree, zero: int) -> StateSharding:
    """What is shared at a stage of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 5).

    Args:
        mesh: Axes `data` and `fsdp`, as `make_mesh` makes them.
        params: Arrays or `ShapeDtypeStruct`s.
        weights: Their declarations (`Model.weights`).
        zero: 1 shares optimizer state only; 2 gradients as well; 3 parameters as well.
    """
    shared = param_shardings(mesh, params, weights)
    everywhere = jax.tree.map(lambda _: replicated(mesh), shared)
    return StateSharding(
        params=shared if zero >= 3 else everywhere,
        gradients=shared if zero >= 2 else everywhere,
        update=shared,
    )


def bytes_per_device(tree: PyTree) -> int:
    """Bytes that each device holds of a tree of arrays, or `ShapeDtypeStruct`s, with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sequences, the leading axis of a token batch, shared out over all devices."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def one_layer(sharding: NamedSharding) -> NamedSharding:
    """How one block's share of a stacked parameter is divided."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _spec(mesh: Mesh, weight: Weight, shapes: tuple[tuple[int, ...], ...]) -> PartitionSpec | None:
    """How arrays that stand for a parameter are divided alike; None, where no axis of them can be, and one should."""
    # Statistics that an optimizer keeps per row or column have fewer axes than their parameter: small, so replicated,
    # as vectors and scalars are.
    if len(weight.stacked_axes) != len(shapes[0]) or weight.role in ("norm", "bias", "scalar"):
        return PartitionSpec()
    divided = divided_axis(weight.stacked_axes, shapes, mesh.shape)
    if isinstance(divided, tuple):
        place, axis = divided
        return PartitionSpec(*(axis if i == place else None for i in range(len(shapes[0]))))
    return PartitionSpec() if divided is None else None


def _name(path: tuple[object, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.cache
def _warn_once(name: str, shape: tuple[int, ...], devices: int) -> None:
    _log.warning(
        "%s of shape %s is replicated: none of its axes is a multiple of train.fsdp=%d. Each device holds all of it; "
        "choose a width or vocabulary that %d divides to share it.",
        name, shape, devices, devices,
    )  # fmt: skip
