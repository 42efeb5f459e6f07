"""Matrices as they are read token by token on a CPU: of a whole stack in place, by the kernel for them."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from cramjax.kernels.dense.few_rows import MOST_ROWS, few_rows
from cramjax.kernels.dense.packed import Packed
from cramjax.kernels.packed.quantised import Quantised


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Streamed(Packed):
    """A constant matrix (inner, outer), or a stack of them of which one is meant, or none yet.

    Walks do not cut it out of its stack (`at`): what is cut for a call out of XLA is a copy.
    """

    kept: Any
    """An array or a `Quantised`: (inner, outer), or with an axis of layers before. uint16: bits of bfloat16."""
    layer: Any = None
    """Which of a stack, int32 (); None where none is meant."""
    rounds: bool = field(default=False, metadata={"static": True})
    """Whether rows are rounded to 8 bits too: where they are few, or, if `kept` says that they are, always."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that is meant, or of the stack."""
        return self.kept.shape if self.layer is None else self.kept.shape[1:]

    @property
    def dtype(self) -> Any:
        """Of what `unpacked` gives."""
        return jnp.dtype(jnp.bfloat16) if self.kept.dtype == jnp.uint16 else self.kept.dtype

    def at(self, layer: int | Int[Array, ""]) -> "Streamed":
        """One matrix of a stack; nothing is read."""
        return replace(self, layer=jnp.asarray(layer, jnp.int32))

    def __getitem__(self, index: Any) -> "Streamed":
        """The same for all of it (`...`), else a matrix of the stack."""
        return self if index is ... else self.at(index)

    def multiply(self, x: Float[Array, "rows inner"], dtype: DTypeLike) -> Float[Array, "rows outer"]:
        """The product of rows with the matrix, by the kernel, in float32."""
        layer = 0 if self.layer is None else self.layer
        if isinstance(self.kept, Quantised):
            rounds = self.rounds and (self.kept.rounds or len(x) <= MOST_ROWS)
            own = {"scale": self.kept.scale, "zero": self.kept.zero, "rounds": rounds}
            return few_rows(x, self.kept.q, layer, **own).astype(dtype)
        return few_rows(x, self.kept, layer).astype(dtype)

    def unpacked(self) -> Float[Array, "*stack inner outer"]:
        """The matrix."""
        own = self._meant()
        return own.unpacked() if isinstance(own, Packed) else _numbers(own)

    def outputs(self, numbers: Int[Array, "*batch"]) -> Float[Array, "*batch inner"]:
        """Columns of one matrix by number: rows of the embedding that is the head as well. A number past the end reads
        the last one.
        """
        if isinstance(self.kept, Quantised):
            own = jax.tree.map(lambda part: part.at[:, numbers.reshape(-1)].get(mode="clip"), self.kept)
            return own.unpacked().T.reshape(*numbers.shape, -1)
        return jnp.moveaxis(_numbers(self.kept.at[:, numbers].get(mode="clip")), 0, -1)

    def _meant(self) -> Any:
        return self.kept if self.layer is None else jax.tree.map(lambda part: part[self.layer], self.kept)


def table_of(w: Float[Array, "embed vocab"]) -> "Streamed":
    """A matrix that is the head and whose columns are looked up as well; one of bfloat16 is kept as its bits.

    XLA's CPU backend widens a table of bfloat16 as a whole to look something up in it, in each call of a program. Bits
    it does not, and only what was found of them is a number.
    """
    return Streamed(jax.lax.bitcast_convert_type(w, jnp.uint16) if w.dtype == jnp.bfloat16 else w)


def _numbers(kept: Array) -> Array:
    return jax.lax.bitcast_convert_type(kept, jnp.bfloat16) if kept.dtype == jnp.uint16 else kept


def streams(w: Any) -> bool:
    """Whether the kernel multiplies such a matrix, given that it runs at all: an array, or codes in whole
    bytes: of 8 bits, or pairs of 4.
    """
    if isinstance(w, Quantised):
        return w.ndim in (2, 3) and (w.bits == 8 or (w.bits == 4 and w.group % 2 == 0))
    return not isinstance(w, Packed) and w.ndim in (2, 3) and w.dtype in (jnp.float32, jnp.bfloat16)
