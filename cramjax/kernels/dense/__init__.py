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
    product = jnp.matmul(x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)
    return product.astype(dtype)
