"""Norm and rotation of heads by XLA: the norm keeps its input, and the rotation nothing."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from cramjax.kernels.norm import normalise


def normalise_and_rotate(
    queries: int,
    eps: float | None,
    x: Float[Array, "batch seq all_heads head_dim"],
    rotary: tuple[Float[Array, "rows seq 1 half"], Float[Array, "rows seq 1 half"]] | None,
) -> tuple[Float[Array, "batch seq heads head_dim"], Float[Array, "batch seq kv_heads head_dim"]]:
    """Queries and keys; arguments as of the public function."""
    if eps is not None:
        x = normalise(x, centred=False, eps=eps, implementation="xla")
    if rotary is not None:
        x = rotate(x, *rotary)
    q, k = jnp.split(x, [queries], axis=2)
    return q, k


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float[Array, "rows seq 1 half"],
    sin: Float[Array, "rows seq 1 half"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Turn the pairs (x[i], x[i + head_dim / 2]) by their angles."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
