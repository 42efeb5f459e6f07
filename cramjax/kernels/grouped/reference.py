"""By definition: every matrix multiplies all rows, and those that are not its group's are left out."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from cramjax.kernels.dense.packed import unpacked
from cramjax.kernels.grouped.groups import Groups


def reference(x: Float[Array, "rows inner"], w: Any, groups: Groups, dtype: Any) -> Float[Array, "rows outer"]:
    """As of `cramjax.kernels.grouped.grouped`."""
    w, total = unpacked(w).astype(dtype), 0.0
    own = jnp.repeat(groups.group_of_block, groups.block)
    for group in range(groups.count):
        result = jnp.matmul(x.astype(dtype), w[group], preferred_element_type=jnp.float32)
        total = total + jnp.where((own == group)[:, None], result, 0.0)
    return jnp.asarray(total).astype(dtype)
