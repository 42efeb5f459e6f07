"""One device or many: the mesh, and the table that says what is sharded over it."""

from cramjax.parallel.mesh import make_mesh
from cramjax.parallel.sharding import batch_sharding, param_shardings, replicated

__all__ = ["batch_sharding", "make_mesh", "param_shardings", "replicated"]
