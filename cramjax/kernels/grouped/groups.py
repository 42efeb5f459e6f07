"""Rows sorted by the matrix that they are multiplied with, in blocks of one size: shapes depend on no choice."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MOST_ROWS = {"cpu": 64, "gpu": 1024}
_FEWEST_ROWS = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """Rows in blocks, each of which is of one group. A group's blocks follow each other."""

    bounds: Any
    """Block that each group begins with, and the one after the last group's, int32 (groups + 1,)."""
    block: int = field(metadata={"static": True})
    """Rows of a block; those that are of nobody are 0."""
    blocks: int = field(metadata={"static": True})
    """As many as there may have to be; from `bounds[-1]` on they are of nobody."""
    even: bool = field(default=False, metadata={"static": True})
    """Whether every group has as many blocks as any other."""

    @property
    def rows(self) -> int:
        """Of all blocks."""
        return self.block * self.blocks

    @property
    def count(self) -> int:
        """Groups."""
        return self.bounds.shape[0] - 1

    @property
    def group_of_block(self) -> Int[Array, " blocks"]:
        """The group of each block; those that are of nobody are given to the last."""
        found = jnp.searchsorted(self.bounds[1:], jnp.arange(self.blocks), side="right")
        return jnp.minimum(found, self.count - 1).astype(jnp.int32)

    @property
    def sizes(self) -> Int[Array, " groups"]:
        """Rows of each group, those of nobody among them."""
        return self.block * jnp.diff(self.bounds)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arrangement:
    """Where each token's rows lie among sorted ones, and whose each of these is."""

    groups: Groups
    place: Any
    """Row of each of a token's choices, int32 (tokens, choices); one past the last: it was dropped."""
    source: Any
    """Choice, counted over all tokens, that each row is of, int32 (rows,); one past the last: it is of nobody."""


def rows_of_block(platform: str, rows: int, groups: int) -> int:
    """Rows of a block for so many rows in so many groups: about half a group's on CPUs, whose products are fast from a
    few dozen rows on; on GPUs as many, but up to 1024, for one product is to fill the card.

    Larger blocks waste more rows, half a block a group in the mean; of smaller ones each reads its matrix again.

    Args:
        platform: of the device.
        rows: in all.
        groups: that they are divided among.
    """
    if platform not in _MOST_ROWS:
        return 1  # its grouped product needs no blocks
    half = max(1, rows // (2 * groups))
    return min(max(_FEWEST_ROWS, 1 << (half.bit_length() - 1)), _MOST_ROWS[platform], 1 << (rows - 1).bit_length())


def most_blocks(rows: int, groups: int, block: int) -> int:
    """Blocks that so many rows may need, however they are divided among groups."""
    return (rows + groups * (block - 1)) // block


def arrange(chosen: Int[Array, "tokens choices"], groups: int, block: int) -> Arrangement:
    """Sort rows by group, and drop none.

    Args:
        chosen: group of each of a token's choices.
        groups: how many there are.
        block: rows of a block.
    """
    rows = chosen.size
    counts, order, ranks = _ranked(chosen, groups)
    needed = -(-counts // block)
    bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(needed, dtype=jnp.int32)])
    made = Groups(bounds, block, most_blocks(rows, groups, block))
    first = block * bounds[chosen.reshape(-1)[order]]
    return _arranged(chosen, made, order, first + ranks)


def arrange_within(chosen: Int[Array, "tokens choices"], groups: int, capacity: int) -> Arrangement:
    """Sort rows by group, each of which takes so many: those of the first tokens. The rest is dropped.

    Args:
        chosen: group of each of a token's choices; `groups`: it is dropped, and takes nobody's room.
        groups: how many there are.
        capacity: rows that each group has room for.
    """
    _, order, ranks = _ranked(chosen, groups)
    made = Groups(jnp.arange(groups + 1, dtype=jnp.int32), capacity, groups, even=True)
    group = chosen.reshape(-1)[order]
    kept = (group < groups) & (ranks < capacity)
    return _arranged(chosen, made, order, jnp.where(kept, capacity * group + ranks, made.rows))


def _ranked(chosen: Array, groups: int) -> tuple[Array, Array, Array]:
    """Rows of each group; choices sorted by group; and the number of each of these within its group."""
    flat = chosen.reshape(-1)
    counts = jnp.zeros(groups, jnp.int32).at[flat].add(1)
    order = jnp.argsort(flat, stable=True)
    first = jnp.cumsum(counts, dtype=jnp.int32) - counts
    return counts, order, jnp.arange(flat.size, dtype=jnp.int32) - first[flat[order]]


def _arranged(chosen: Array, groups: Groups, order: Array, places: Array) -> Arrangement:
    place = jnp.zeros(chosen.size, jnp.int32).at[order].set(places, unique_indices=True)
    nobody = jnp.full(groups.rows, chosen.size, jnp.int32)
    source = nobody.at[place].set(jnp.arange(chosen.size, dtype=jnp.int32), mode="drop")
    return Arrangement(groups, place.reshape(chosen.shape), source)


@jax.custom_vjp
def dispatch(x: Float[Array, "tokens embed"], arrangement: Arrangement) -> Float[Array, "rows embed"]:
    """The row that each place is to have; 0 where it is of nobody. Its gradient is gathered too, not scattered.

    Args:
        x: a row for each token.
        arrangement: of the tokens.
    """
    return _rows(x, arrangement.source // arrangement.place.shape[1])


def _dispatch_backward(arrangement: Arrangement, g: Array) -> tuple[Array, None]:
    return jnp.sum(_rows(g, arrangement.place).astype(jnp.float32), axis=1).astype(g.dtype), None


dispatch.defvjp(lambda x, arrangement: (dispatch(x, arrangement), arrangement), _dispatch_backward)


def combine(
    y: Float[Array, "rows embed"], gates: Float[Array, "tokens choices"], arrangement: Arrangement
) -> Float[Array, "tokens embed"]:
    """What each token's choices give, weighed and summed in float32; 0 for those that were dropped.

    Args:
        y: sorted rows.
        gates: weights of a token's choices, float32.
        arrangement: of the tokens.
    """
    return jnp.sum(_undone(y, arrangement) * gates[..., None], axis=1).astype(y.dtype)


@jax.custom_vjp
def _undone(y: Array, arrangement: Arrangement) -> Float[Array, "tokens choices embed"]:
    return _rows(y, arrangement.place)


def _undone_backward(arrangement: Arrangement, g: Array) -> tuple[Array, None]:
    return _rows(g.reshape(-1, g.shape[-1]), arrangement.source), None


_undone.defvjp(lambda y, arrangement: (_undone(y, arrangement), arrangement), _undone_backward)


def _rows(x: Array, numbers: Array) -> Array:
    """Rows by number; 0 past the last."""
    return x.at[numbers].get(mode="fill", fill_value=0)
