"""Norm and rotation of heads as they are defined, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def normalise_and_rotate(
    queries: int,
    eps: float | None,
    x: Float[Array, "batch seq all_heads head_dim"],
    rotary: tuple[Float[Array, "rows seq 1 half"], Float[Array, "rows seq 1 half"]] | None,
    weights: tuple[Float[Array, " head_dim"], Float[Array, " head_dim"]] | None = None,
) -> tuple[Float[Array, "batch seq heads head_dim"], Float[Array, "batch seq kv_heads head_dim"]]:
    """Queries and keys; JAX takes the derivative. Arguments as of the public function."""
    y = x.astype(jnp.float32)
    if eps is not None:
        y = y / jnp.sqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    if weights is not None:
        which = (jnp.arange(x.shape[2]) >= queries)[:, None]
        y = y * jnp.where(which, weights[1], weights[0])
    if rotary is not None:
        cos, sin = rotary
        first, second = y[..., : y.shape[-1] // 2], y[..., y.shape[-1] // 2 :]
        y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    y = y.astype(x.dtype)
    return y[:, :, :queries], y[:, :, queries:]
