"""One device or many: the mesh, and the table that says what is sharded over it."""

from cramjax.parallel.mesh import make_mesh, on_mesh
from cramjax.parallel.sharding import (
    StateSharding,
    batch_sharding,
    bytes_per_device,
    one_layer,
    param_shardings,
    replicated,
    zero_shardings,
)

__all__ = [
    "StateSharding",
    "batch_sharding",
    "bytes_per_device",
    "make_mesh",
    "on_mesh",
    "one_layer",
    "param_shardings",
    "replicated",
    "zero_shardings",
]
