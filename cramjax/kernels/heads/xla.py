"""Norm and rotation of heads by XLA: the norm keeps its input, and the rotation nothing."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from cramjax.kernels.norm import normalise


def normalise_and_rotate(
    queries: int,
    eps: float | None,
    x: Float[Array, "batch seq all_heads head_dim"],
    rotary: tuple[Float[Array, "rows seq 1 half"], Float[Array, "rows seq 1 half"]] | None,
    weights: tuple[Float[Array, " head_dim"], Float[Array, " head_dim"]] | None = None,
) -> tuple[Float[Array, "batch seq heads head_dim"], Float[Array, "batch seq kv_heads head_dim"]]:
    """Queries and keys; arguments as of the public function."""
    if eps is not None and weights is None:
        x = normalise(x, centred=False, eps=eps, implementation="xla")
    elif eps is not None:
        halves = zip(jnp.split(x, [queries], axis=2), weights or (), strict=True)
        each = [normalise(own, weight, centred=False, eps=eps, implementation="xla") for own, weight in halves]
        x = jnp.concatenate(each, axis=2)
    if rotary is not None:
        x = rotate(x, *rotary)
    q, k = jnp.split(x, [queries], axis=2)
    return q, k


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float[Array, "rows seq 1 half"],
    sin: Float[Array, "rows seq 1 half"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Turn the pairs (x[i], x[i + head_dim / 2]) by their angles, in float32; the result is rounded once."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
