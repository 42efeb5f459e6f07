"""The sharding table: parameter path → logical axes → mesh axes.

A parameter is named once, here, by the end of its path; the optimizer's copies of it (moments, averages) end in the
same path and are sharded like it. What the table does not name is replicated: norms, biases, scalars, counters, keys.
How much of a training state follows the table is the stage of ZeRO.
"""

import functools
import logging
import math
import re
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from cramjax.kernels.packed import Packed, is_packed

_LOGICAL_AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("embed/(token|bigram)/table", ("vocab", "embed")),
    ("embed/(position|token_type)/table", ("seq", "embed")),
    ("embed/value/table", ("layer", "vocab", "heads")),
    ("blocks/attention/qkv/kernel", ("layer", "embed", "heads")),
    ("blocks/attention/out/kernel", ("layer", "heads", "embed")),
    ("blocks/mlp/up/kernel", ("layer", "embed", "mlp")),
    ("blocks/mlp/down/kernel", ("layer", "mlp", "embed")),
    ("head/transform/dense/kernel", ("embed", "heads")),
    ("head/(?:tail\\d+/)?decoder/kernel", ("embed", "vocab")),
    ("head/tail\\d+/down/kernel", ("embed", "heads")),
)
_MESH_AXIS: dict[str, str | None] = {
    "embed": "fsdp",
    "heads": "fsdp",
    "mlp": "fsdp",
    "vocab": "fsdp",
    "layer": None,  # the walk over the stack indexes it
    "seq": None,
}

_log = logging.getLogger(__name__)


def param_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """Shardings of parameters, or of any tree that holds them or copies of them, such as a whole training state.

    One axis of each parameter is divided over a mesh axis: the largest of those that the table maps to it and that it
    divides. Where it divides none, the array is replicated, and a warning says so once. The parts of a packed matrix
    are divided alike.

    Args:
        mesh: Axes `data` and `fsdp`, as `make_mesh` makes them.
        tree: Arrays or `ShapeDtypeStruct`s.

    Returns:
        A tree of the same structure, of `NamedSharding`s.
    """

    def sharding(path: tuple[object, ...], leaf: jax.Array | jax.ShapeDtypeStruct | Packed) -> PyTree:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = _spec(mesh, name, leaf.shape, *(part.shape for part in jax.tree.leaves(leaf)))
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), leaf)

    return jax.tree_util.tree_map_with_path(sharding, tree, is_leaf=is_packed)


class StateSharding(NamedTuple):
    """How the `fsdp` axis shares what a step works on: trees of shardings, one for each parameter or array of state."""

    params: PyTree
    """Parameters between steps."""
    gradients: PyTree
    """Gradients, and the sums that they are accumulated in."""
    update: PyTree
    """Parameters and gradients while the optimizer updates its share of them."""


def zero_shardings(mesh: Mesh, params: PyTree, zero: int) -> StateSharding:
    """What is shared at a stage of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 5).

    Args:
        mesh: Axes `data` and `fsdp`, as `make_mesh` makes them.
        params: Arrays or `ShapeDtypeStruct`s.
        zero: 1 shares optimizer state only; 2 gradients as well; 3 parameters as well.
    """
    shared = param_shardings(mesh, params)
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
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def one_layer(sharding: NamedSharding) -> NamedSharding:
    """How one block's share of a stacked parameter is divided."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _spec(mesh: Mesh, path: str, shape: tuple[int, ...], *parts: tuple[int, ...]) -> PartitionSpec:
    """How a parameter is divided, and all its parts: the array that it is, or those that it is packed in."""
    name, axes = _logical_axes(path)
    # Statistics that an optimizer keeps per row or column have fewer axes than their parameter: small, so replicated.
    if len(axes) != len(shape):
        return PartitionSpec()
    wanted = {i: axis for i, logical in enumerate(axes) if (axis := _MESH_AXIS[logical]) and mesh.shape[axis] > 1}
    fitting = [i for i, axis in wanted.items() if all(each[i] % mesh.shape[axis] == 0 for each in parts)]
    if not fitting:
        if wanted:
            _warn_once(name, shape, max(mesh.shape[axis] for axis in wanted.values()))
        return PartitionSpec()
    largest = max(fitting, key=lambda i: shape[i])
    return PartitionSpec(*(wanted[i] if i == largest else None for i in range(len(shape))))


def _logical_axes(path: str) -> tuple[str, tuple[str, ...]]:
    for pattern, axes in _LOGICAL_AXES:
        if match := re.search(rf"(?:^|/)({pattern})$", path):
            return match[1], axes
    return path, ()


@functools.cache
def _warn_once(name: str, shape: tuple[int, ...], devices: int) -> None:
    _log.warning(
        "%s of shape %s is replicated: none of its axes is a multiple of train.fsdp=%d. Each device holds all of it; "
        "choose a width or vocabulary that %d divides to share it.",
        name, shape, devices, devices,
    )  # fmt: skip
