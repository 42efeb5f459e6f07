"""Norms as they are defined, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from cramjax.kernels.norm.rule import Rule


def normalise_beside(
    rule: Rule,
    x: Float[Array, "*batch embed"],
    weight: Float[Array, " embed"] | None,
    bias: Float[Array, " embed"] | None,
) -> tuple[Float[Array, "*batch embed"], Float[Array, "*batch embed"]]:
    """`x`, and `x` normalised; JAX takes the derivative."""
    y = x.astype(jnp.float32)
    if rule.centred:
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y / jnp.sqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + rule.eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return x, y.astype(x.dtype)
