"""What a weight is, said once where its layer makes it: shape, logical axes, role, initialiser, what is fused in it.

`Model.weights` is the tree of these. Initial and abstract parameters, shardings, the optimizer's groups, counts, import
and export read it, and know nothing of names.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Role = Literal["matrix", "embedding", "head", "norm", "bias", "scalar", "router", "balance"]
"""`router`: a small matrix whose results choose, in float32. `balance`: numbers that have no gradient, but stand for
what is to be levelled out: the sign of what comes in a gradient's place says which way each is to move."""


@dataclass(frozen=True)
class Normal:
    """Drawn from a normal distribution around 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    """The same number everywhere."""

    value: float


@dataclass(frozen=True)
class Weight:
    """A parameter of the model, declared."""

    shape: tuple[int, ...]
    """Of one block's, without the axis of repeats."""
    axes: tuple[str, ...]
    """Logical axis of each dimension; `cramjax.axes` says what becomes of it on a mesh."""
    role: Role
    """What optimizers and packing treat it as."""
    init: Normal | Constant
    widths: tuple[int, ...] = ()
    """Columns of the matrices that are fused side by side, on the last axis; empty: it is one."""
    repeats: int | None = None
    """Blocks that are stacked on a leading axis; None: it is of embedding or head."""
    rate: float = 1.0
    """Its learning rate over that of its role."""
    always_trained: bool = False
    """Whether it is trained, and held in float32, beside an adapter too, which the model's other weights are not."""

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Of the array among the parameters."""
        return self.shape if self.repeats is None else (self.repeats, *self.shape)

    @property
    def stacked_axes(self) -> tuple[str, ...]:
        """Logical axes of the array among the parameters."""
        return self.axes if self.repeats is None else ("layer", *self.axes)

    def real_shape(self, vocab_size: int) -> tuple[int, ...]:
        """Of the array, without the padding of a vocabulary of so many tokens."""
        pairs = zip(self.stacked_axes, self.stacked_shape, strict=True)
        return tuple(vocab_size if axis == "vocab" else size for axis, size in pairs)

    @property
    def size(self) -> int:
        """Numbers in it, over all repeats."""
        return math.prod(self.stacked_shape)

    def stacked(self, repeats: int) -> "Weight":
        """The same weight of so many blocks."""
        return replace(self, repeats=repeats)

    def drawn(self, key: Array | None) -> Float[Array, "..."]:
        """One block's as it starts, in float32.

        Args:
            key: a random key, which a normal distribution needs.
        """
        if isinstance(self.init, Constant):
            return jnp.full(self.shape, self.init.value, jnp.float32)
        if key is None:
            raise ValueError("a weight that starts at random needs a random key")
        return self.init.std * jax.random.normal(key, self.shape)
