"""Axes: what the devices of a mesh share, and which logical axes of parameters they divide.

A leaf module: the sharding of parameters, the mesh and what looks at its axes read it.
"""

from collections.abc import Mapping, Sequence

MESH_AXES = ("data", "fsdp")
"""Of a mesh, outermost first. The sequences of a batch are shared out over both."""
SHARD_AXIS = "fsdp"
"""Over which parameters and optimizer state are divided."""

_MESH_AXIS: dict[str, str | None] = {
    "embed": SHARD_AXIS,
    "heads": SHARD_AXIS,
    "mlp": SHARD_AXIS,
    "expert": SHARD_AXIS,
    "vocab": SHARD_AXIS,  # with its padding
    "classes": SHARD_AXIS,  # of a softmax that is not over the whole vocabulary
    "buckets": SHARD_AXIS,
    "layer": None,  # the walk over the stack indexes it
    "seq": None,
    "rank": None,
    "head_dim": None,
}


def divided_axis(
    axes: Sequence[str], shapes: Sequence[Sequence[int]], mesh: Mapping[str, int]
) -> tuple[int, str] | str | None:
    """Which dimension a mesh divides: the largest of those that have a mesh axis and are a multiple of it.

    Args:
        axes: logical axis of each dimension.
        shapes: of the array, or of each of the parts that it is packed in, all of which are to be divided alike; the
            first says which dimension is the largest.
        mesh: size of each mesh axis.

    Returns:
        The dimension and its mesh axis; the mesh axis alone, where no dimension is a multiple of it; None, where
        nothing is to be divided.
    """
    wanted = {i: axis for i, logical in enumerate(axes) if (axis := _MESH_AXIS[logical]) and mesh[axis] > 1}
    fitting = [i for i, axis in wanted.items() if all(shape[i] % mesh[axis] == 0 for shape in shapes)]
    if fitting:
        largest = max(fitting, key=lambda i: shapes[0][i])
        return largest, wanted[largest]
    return max(wanted.values(), key=lambda axis: mesh[axis]) if wanted else None
