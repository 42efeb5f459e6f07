"""The one matrix product of the model: operands in the compute precision, accumulation in float32."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def dense(
    x: Float[Array, "*batch inner"], w: Float[Array, "inner outer"], *, dtype: DTypeLike = jnp.float32
) -> Float[Array, "*batch outer"]:
    """Multiply activations with a weight matrix.

    Args:
        x: activations (..., inner).
        w: weights (inner, outer), in any precision; they are rounded to `dtype` for the product.
        dtype: precision of the operands and of the result. Sums are float32.

    Returns:
        The product (..., outer) in `dtype`.
    """
    # As one plain product: XLA's CPU backend runs the derivative of a batched one a third slower.
    rows = x.astype(dtype).reshape(-1, x.shape[-1])
    product = jnp.matmul(rows, w.astype(dtype), preferred_element_type=jnp.float32)
    return product.astype(dtype).reshape(*x.shape[:-1], w.shape[1])
