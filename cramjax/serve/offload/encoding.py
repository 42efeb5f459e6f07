"""Keys and values as a cache holds them: numbers, or codes of 4 bits in groups of a head's.

Source: Sheng et al. 2023, arXiv:2303.06865, section 5 (group-wise quantisation).
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

_GROUP = 64


class Encoding(Protocol):
    """How keys or values (..., head_dim) are held, as a tree of arrays with their leading axes."""

    def encode(self, x: Float[Array, "*places head_dim"]) -> PyTree:
        """What is held."""
        ...

    def decode(self, held: PyTree) -> Float[Array, "*places head_dim"]:
        """The numbers that it stands for."""
        ...


@dataclass(frozen=True)
class Plain:
    """Numbers of a precision."""

    dtype: str

    def encode(self, x: Float[Array, "*places head_dim"]) -> PyTree:
        """Rounded."""
        return x.astype(self.dtype)

    def decode(self, held: PyTree) -> Float[Array, "*places head_dim"]:
        """As they are."""
        return held


@dataclass(frozen=True)
class Grouped:
    """Codes of 4 bits, each group from its smallest number to its largest in 15 steps; scales in 16 bits."""

    dtype: str
    """Precision of what is decoded."""

    def encode(self, x: Float[Array, "*places head_dim"]) -> PyTree:
        """Codes in pairs (..., head_dim / 2), and of each group the smallest number and the step."""
        *lead, size = x.shape
        groups = x.astype(jnp.float32).reshape(*lead, -1, math.gcd(size, _GROUP))
        low = jnp.min(groups, axis=-1).astype(jnp.float16)
        step = ((jnp.max(groups, axis=-1) - low.astype(jnp.float32)) / 15).astype(jnp.float16)
        divisor = jnp.where(step == 0, 1, step).astype(jnp.float32)[..., None]
        codes = jnp.clip(jnp.round((groups - low.astype(jnp.float32)[..., None]) / divisor), 0, 15).astype(jnp.uint8)
        pairs = codes.reshape(*lead, -1, 2)
        return {"codes": pairs[..., 0] | pairs[..., 1] << 4, "low": low, "step": step}

    def decode(self, held: PyTree) -> Float[Array, "*places head_dim"]:
        """Each code's number."""
        codes, low, step = (held[name] for name in ("codes", "low", "step"))
        own = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*low.shape, -1).astype(jnp.float32)
        numbers = own * step.astype(jnp.float32)[..., None] + low.astype(jnp.float32)[..., None]
        return numbers.reshape(*codes.shape[:-1], -1).astype(self.dtype)


def encoding_of(cache: str, dtype: str) -> Encoding:
    """The encoding of a name.

    Args:
        cache: `auto` or `int4`.
        dtype: that the model computes in.
    """
    return Grouped(dtype) if cache == "int4" else Plain(dtype)


def cache_shapes(encoding: Encoding, places: tuple[int, ...], kv_heads: int, head_dim: int) -> PyTree:
    """Shapes of keys and of values with some leading axes.

    Args:
        encoding: how they are held.
        places: the leading axes.
        kv_heads: heads of keys and values.
        head_dim: of a head.
    """
    x = jax.ShapeDtypeStruct((*places, kv_heads, head_dim), jnp.float32)
    one: Any = jax.eval_shape(encoding.encode, x)
    return {"keys": one, "values": one}


def token_bytes(encoding: Encoding, kv_heads: int, head_dim: int) -> int:
    """Bytes of the keys and values of a token in a block."""
    shapes = jax.tree.leaves(cache_shapes(encoding, (1,), kv_heads, head_dim))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes)
