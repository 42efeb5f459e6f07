"""Caches of keys and values, as values with one interface: extend a block's by new tokens, and attend.

A cache belongs to one block of a period and is stacked over the repeats. `Contiguous` has a place for every token;
`Ring`, for blocks that see a sliding window, for those of a window, whatever the length of the text. `Paged` has its
places in pages of a pool that many rows share.
"""

import abc
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cramjax.kernels.attention import attention
from cramjax.kernels.attention.pages import attend_pages


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """Where the new tokens of each row stand."""

    start: Int[Array, " batch"]
    """Tokens that the row holds before them."""
    real: Bool[Array, "batch seq"]
    """False for padding, which comes after the real ones."""
    segment_ids: Int[Array, "batch seq"] | None = None
    """Document of each new token, where attention stays within documents."""
    kv_segment_ids: Int[Array, "batch length"] | None = None
    """Of every token, the new ones among them, by its position."""
    by_kernel: bool = field(default=False, metadata={"static": True})
    """Whether the kernel for single queries on CPUs may be used."""

    @property
    def positions(self) -> Int[Array, "batch seq"]:
        """Of the new tokens in their rows; those of padding mean nothing."""
        return self.start[:, None] + jnp.arange(self.real.shape[1])

    @property
    def lengths(self) -> Int[Array, "batch seq"]:
        """Tokens of its row that each new token sees, itself included; 0 for padding."""
        return jnp.where(self.real, self.positions + 1, 0)


def after_prefix(
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    prefix: tuple[Array, Array],
    options: dict[str, Any],
) -> tuple[Array, Array, dict[str, Any]]:
    """Keys and values with those of a prefix before them, and the arguments of attention that go with them.

    Args:
        k: keys.
        v: values.
        prefix: keys and values (batch, tokens, kv_heads, head_dim) that every query sees.
        options: arguments of attention without them.
    """
    batch, length, tokens = len(k), k.shape[1], prefix[0].shape[1]
    places = options.get("query_positions", jnp.broadcast_to(jnp.arange(length), (batch, length)))
    documents = options.get("kv_segment_ids", options.get("segment_ids"))
    mask = options.get("kv_mask")
    own: dict[str, Any] = {"query_positions": places + tokens}
    if documents is not None:
        own["kv_segment_ids"] = jnp.pad(documents, ((0, 0), (tokens, 0)))
    if mask is not None:
        own["kv_mask"] = jnp.pad(mask, ((0, 0), (tokens, 0)), constant_values=True)
    k, v = (jnp.concatenate([before, x], axis=1) for before, x in zip(prefix, (k, v), strict=True))
    return k, v, {**options, **own}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache(abc.ABC):
    """Keys and values of the tokens that a block has seen; a tree of them may hold shapes or places instead."""

    keys: Any
    """Float (repeats, batch, places, kv_heads, head_dim)."""
    values: Any
    """Shaped as the keys."""

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: Any) -> "Cache":
        """With nothing in it: (repeats, batch, places, kv_heads, head_dim)."""
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @abc.abstractmethod
    def attend(
        self,
        repeat: int | Array,
        q: Float[Array, "batch seq heads head_dim"],
        k: Float[Array, "batch seq kv_heads head_dim"],
        v: Float[Array, "batch seq kv_heads head_dim"],
        places: Places,
        **options: Any,
    ) -> tuple[Float[Array, "batch seq heads head_dim"], "Cache"]:
        """Hold new tokens, and attend from them to all that there are.

        Args:
            repeat: which of the stacked blocks this is; may be traced.
            q: queries of the new tokens.
            k: their keys.
            v: their values.
            places: where they stand.
            options: window, scale, softcap and shared, as of `cramjax.kernels.attention`; and prefix, as of
                `after_prefix`.

        Returns:
            What the queries give, and the cache with the new tokens; one past its end is not held.
        """

    def pages(self, batch: int) -> Int[Array, "batch pages"] | None:
        """Pages of each row in order, where keys are (repeats, pages, places, kv_heads, head_dim); else None.

        Args:
            batch: rows.
        """
        del batch

    def with_pages(self, keys: Array, values: Array) -> "Cache":
        """The same with other keys and values."""
        return replace(self, keys=keys, values=values)

    def _written(self, at: tuple[Any, ...], k: Array, v: Array) -> "Cache":
        keys = self.keys.at[at].set(k.astype(self.keys.dtype), mode="drop")
        return type(self)(keys, self.values.at[at].set(v.astype(self.values.dtype), mode="drop"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Contiguous(Cache):
    """A place for every token, in order."""

    def pages(self, batch: int) -> Int[Array, "batch pages"]:
        """A row is a page."""
        return jnp.arange(batch)[:, None]

    def attend(
        self,
        repeat: int | Array,
        q: Float[Array, "batch seq heads head_dim"],
        k: Float[Array, "batch seq kv_heads head_dim"],
        v: Float[Array, "batch seq kv_heads head_dim"],
        places: Places,
        **options: Any,
    ) -> tuple[Float[Array, "batch seq heads head_dim"], Cache]:
        """As of `Cache`."""
        # Padding goes past the end, where writes are dropped.
        at = jnp.where(places.real, places.positions, self.keys.shape[2])
        if _by_kernel(self, q, places, options):
            return _attended_in_place(self, repeat, (q, k, v), places, options)
        held = self._written((repeat, jnp.arange(len(q))[:, None], at), k, v)
        keys, values = held.keys[repeat], held.values[repeat]
        return _attended(q, keys, values, places, at, options), held


def _attended(
    q: Array, keys: Array, values: Array, places: Places, at: Array, options: dict[str, Any]
) -> Float[Array, "batch seq heads head_dim"]:
    """What queries at positions `at` give, of all places in order (batch, places, kv_heads, head_dim)."""
    prefix = options.pop("prefix", None)
    documents = {"segment_ids": places.segment_ids, "kv_segment_ids": places.kv_segment_ids}
    options |= {**documents, "query_positions": at}
    if prefix is not None:
        prefix = tuple(x.astype(keys.dtype) for x in prefix)
        keys, values, options = after_prefix(keys, values, prefix, options)
    return attention(q, keys, values, causal=True, **options)


def _by_kernel(held: Cache, q: Array, places: Places, options: dict[str, Any]) -> bool:
    """Whether the kernel for single queries computes this."""
    if not places.by_kernel or q.shape[1] > 1:
        return False
    return places.segment_ids is None and "shared" not in options and held.keys.dtype == jnp.float32


def _attended_in_place(
    cache: Cache, repeat: int | Array, new: tuple[Array, Array, Array], places: Places, options: dict[str, Any]
) -> tuple[Float[Array, "batch 1 heads head_dim"], Cache]:
    """What one query of each row gives, and the cache with its key and value."""
    table = repeat * cache.keys.shape[1] + cache.pages(len(new[0]))
    q, k, v = (each[:, 0] for each in new)
    out, keys, values = attend_pages(q, k, v, cache.keys, cache.values, table, places.lengths[:, 0], **options)
    return out[:, None], cache.with_pages(keys, values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ring(Cache):
    """As many places as a window is long: a token takes the place of the one that left the window."""

    def attend(
        self,
        repeat: int | Array,
        q: Float[Array, "batch seq heads head_dim"],
        k: Float[Array, "batch seq kv_heads head_dim"],
        v: Float[Array, "batch seq kv_heads head_dim"],
        places: Places,
        **options: Any,
    ) -> tuple[Float[Array, "batch seq heads head_dim"], Cache]:
        """As of `Cache`; new tokens are read from where they come, for they may be more than the ring holds."""
        size, (batch, count) = self.keys.shape[2], q.shape[:2]
        rows = jnp.arange(batch)[:, None]
        before = places.start[:, None] - size + jnp.arange(size)  # positions that the ring holds, oldest first
        slots = before % size

        def all_keys(old: Array, new: Array) -> Array:
            return jnp.concatenate([old[repeat][rows, slots], new.astype(old.dtype)], axis=1)

        documents: dict[str, Array | None] = {"segment_ids": places.segment_ids, "kv_segment_ids": None}
        if places.kv_segment_ids is not None:
            positions = jnp.concatenate([before, places.positions], axis=1)
            documents["kv_segment_ids"] = places.kv_segment_ids.at[rows, jnp.maximum(positions, 0)].get(mode="clip")
        out = attention(
            q,
            all_keys(self.keys, k),
            all_keys(self.values, v),
            causal=True,
            kv_mask=jnp.concatenate([before >= 0, places.real], axis=1),
            query_positions=jnp.broadcast_to(size + jnp.arange(count), (batch, count)),
            **documents,
            **options,
        )
        # Of the new tokens, the last ones stay.
        ends = jnp.sum(places.real, axis=1, keepdims=True)
        stays = places.real & (jnp.arange(count) >= ends - size)
        at = jnp.where(stays, places.positions % size, size)
        return out, self._written((repeat, rows, at), k, v)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Paged(Cache):
    """Pages of a pool, in the order that a row's table gives; rows may have pages in common.

    Its keys and values are (repeats, pages, page, kv_heads, head_dim).

    Source: Kwon et al. 2023, arXiv:2309.06180, section 4.
    """

    table: Any = None
    """The pages of each row, int32 (batch, pages of a row); where a row has fewer, any page's number."""

    def pages(self, batch: int) -> Int[Array, "batch pages"]:
        """As of `Cache`."""
        del batch
        return self.table

    def attend(
        self,
        repeat: int | Array,
        q: Float[Array, "batch seq heads head_dim"],
        k: Float[Array, "batch seq kv_heads head_dim"],
        v: Float[Array, "batch seq kv_heads head_dim"],
        places: Places,
        **options: Any,
    ) -> tuple[Float[Array, "batch seq heads head_dim"], Cache]:
        """As of `Cache`."""
        pages, size = self.keys.shape[1:3]
        batch, most = self.table.shape
        at = jnp.where(places.real, places.positions, most * size)
        if _by_kernel(self, q, places, options):
            return _attended_in_place(self, repeat, (q, k, v), places, options)
        page = jnp.take_along_axis(self.table, jnp.minimum(at // size, most - 1), axis=1)
        index = repeat, jnp.where(places.real, page, pages), at % size  # padding goes past the end, and is dropped
        held = replace(
            self,
            keys=self.keys.at[index].set(k.astype(self.keys.dtype), mode="drop"),
            values=self.values.at[index].set(v.astype(self.values.dtype), mode="drop"),
        )
        rows = (batch, most * size, *k.shape[2:])
        keys, values = held.keys[repeat, self.table].reshape(rows), held.values[repeat, self.table].reshape(rows)
        return _attended(q, keys, values, places, at, options), held
