"""Matrices with trained virtual tokens beside them, which every token sees: prompts and prefixes.

They multiply as their bases do. What lies beside them the layers read: the embedding its prompt (Lester et al. 2021,
arXiv:2104.08691), attention the keys and values of its prefix (Li & Liang 2021, arXiv:2101.00190).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cramjax.kernels.dense import dense_by_constant
from cramjax.kernels.dense.packed import Packed, unpacked


class Virtual(Packed):
    """A constant matrix with virtual tokens beside it. Any part may be None where a tree holds the others."""

    base: Any

    @property
    def count(self) -> int:
        """Virtual tokens."""
        return getattr(self, self.trained[0]).shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: (..., inner, outer)."""
        if self.base is None:
            raise ValueError("virtual tokens without a base do not tell the shape of the matrix that they are beside")
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """Of what `unpacked` gives."""
        return self.base.dtype

    def multiply(self, x: Float[Array, "rows inner"], dtype: DTypeLike) -> Float[Array, "rows outer"]:
        """The product of rows with the matrix; see `Packed.multiply`."""
        return dense_by_constant(x, self.base, dtype=dtype)

    def unpacked(self) -> Float[Array, "*stack inner outer"]:
        """The matrix, which does not know of what is beside it."""
        return unpacked(jax.tree.map(jax.lax.stop_gradient, self.base))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Prompted(Virtual):
    """The table of tokens, with rows of it that stand before every text."""

    base: Any
    """(vocab, embed)."""
    rows: Any = None
    """(tokens, embed), float32."""

    trained: ClassVar[tuple[str, ...]] = ("rows",)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Prefixed(Virtual):
    """Projections of queries, keys and values, with keys and values that every query sees, one set a layer."""

    base: Any
    """(..., embed, outer): an array or a packed matrix."""
    keys: Any = None
    """(..., tokens, kv_heads · head_dim), float32, as they are multiplied with queries: normalised and rotated."""
    values: Any = None
    """Shaped as the keys."""

    trained: ClassVar[tuple[str, ...]] = ("keys", "values")


def prompt_of(table: Any) -> Float[Array, "tokens embed"] | None:
    """The prompt beside a table of tokens, if there is one."""
    return table.rows if isinstance(table, Prompted) else None


def prefix_of(kernel: Any, kv_heads: int, batch: int, dtype: DTypeLike) -> tuple[Array, Array] | None:
    """Keys and values beside projections, for each sequence of a batch; None if there are none.

    Args:
        kernel: of one block.
        kv_heads: heads of keys.
        batch: sequences.
        dtype: in which they are used.

    Returns:
        Two arrays (batch, tokens, kv_heads, head_dim).
    """
    if not isinstance(kernel, Prefixed):
        return None

    def heads(x: Array) -> Array:
        tokens, width = x.shape
        apart = x.astype(dtype).reshape(1, tokens, kv_heads, width // kv_heads)
        return jnp.broadcast_to(apart, (batch, *apart.shape[1:]))

    return heads(kernel.keys), heads(kernel.values)
