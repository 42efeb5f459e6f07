"""Pages of keys and values in a few bits, and the newest page of each row in full.

Keys are coded channel by channel, a page's tokens together; values token by token, a head's channels together. A query
sees pages before its own in codes, and its own in full: what it sees depends on its text alone, not on how that
was cut into calls, so that texts may share pages and be computed again. Keys are coded as they are cached, after the
rotation that gives them their positions.

Source: Liu et al. 2024, KIVI, arXiv:2402.02750, sections 3.2 and 3.3, with a page as group and residual.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cramjax.kernels.dense import matmul, row_major, transposed
from cramjax.model.cache import Cache, Places

BITS = (8, 4, 2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Codes:
    """Numbers as codes · step + low, where `step` and `low` are shared along an axis."""

    codes: Any
    """Uint8 (..., page, kv_heads, head_dim · bits / 8); of channels side by side the first is in the lowest bits."""
    low: Any
    """Float16 (..., page or 1, kv_heads, head_dim or 1)."""
    step: Any
    """Shaped as `low`."""
    bits: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        *lead, width = self.codes.shape
        return (*lead, width * 8 // self.bits)

    @property
    def dtype(self) -> Any:
        """Of the codes."""
        return self.codes.dtype

    def at(self, *index: Any) -> "Codes":
        """Those at an index of the leading axes."""
        return jax.tree.map(lambda part: part[index], self)

    def put(self, index: tuple[Any, ...], new: "Codes") -> "Codes":
        """With others at an index of the leading axes; what lies outside is dropped."""
        return jax.tree.map(lambda part, own: part.at[index].set(own, mode="drop"), self, new)

    def numbers(self, dtype: Any) -> Float[Array, "*pages page kv_heads head_dim"]:
        """What the codes stand for."""
        each = 8 // self.bits
        shifts = jnp.arange(each, dtype=jnp.uint8) * jnp.uint8(self.bits)
        codes = (self.codes[..., None] >> shifts) & jnp.uint8(2**self.bits - 1)
        codes = codes.reshape(self.shape).astype(jnp.float32)
        return (codes * self.step.astype(jnp.float32) + self.low.astype(jnp.float32)).astype(dtype)


def coded(x: Float[Array, "*pages page kv_heads head_dim"], bits: int, axis: int) -> Codes:
    """Round numbers to codes that reach, along an axis, from the smallest to the largest.

    Args:
        x: keys or values.
        bits: of a code.
        axis: along which `low` and `step` are shared: -3, the tokens of a page, or -1, the channels of a head.
    """
    x = x.astype(jnp.float32)
    most = 2**bits - 1
    low = jnp.min(x, axis=axis, keepdims=True).astype(jnp.float16)
    base = low.astype(jnp.float32)
    step = ((jnp.max(x, axis=axis, keepdims=True) - base) / most).astype(jnp.float16)
    wide = step.astype(jnp.float32)
    codes = jnp.clip(jnp.round((x - base) / jnp.where(wide > 0, wide, 1.0)), 0, most).astype(jnp.uint8)
    each = 8 // bits
    parts = codes.reshape(*x.shape[:-1], x.shape[-1] // each, each)
    shifts = jnp.arange(each, dtype=jnp.uint8) * jnp.uint8(bits)
    return Codes(jnp.sum(parts << shifts, axis=-1, dtype=jnp.uint8), low, step, bits)


def coded_keys(x: Float[Array, "*pages page kv_heads head_dim"], bits: int) -> Codes:
    """Keys: each channel of a page in steps of its own."""
    return coded(x, bits, -3)


def coded_values(x: Float[Array, "*pages page kv_heads head_dim"], bits: int) -> Codes:
    """Values: each token's of a head in steps of their own."""
    return coded(x, bits, -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CodedPages(Cache):
    """Pages of a pool as `Paged`, in codes: keys and values are `Codes` (repeats, pages, page, kv_heads, head_dim)."""

    newest: tuple[Any, Any] = (None, None)
    """Keys and values of each slot's newest tokens in full (repeats, slots, places, kv_heads, head_dim): that of
    position p is at p modulo places, which are a page at least, and those of guesses that may be taken back."""
    table: Any = None
    """The pages of each row, as of `Paged`."""
    slots: Any = None
    """The slot of each row, int32 (batch,)."""

    @classmethod
    def made(
        cls, shape: tuple[int, int, int, int, int], slots: int, places: int, dtype: Any, bits: int
    ) -> "CodedPages":
        """With nothing in it.

        Args:
            shape: (repeats, pages, page, kv_heads, head_dim).
            slots: rows that are on their way at once.
            places: of a slot's newest tokens.
            dtype: of these.
            bits: of a code.
        """
        repeats, _, _, *head = shape

        def zeros(x: Any) -> Array:
            return jnp.zeros(x.shape, x.dtype)

        kinds = (jax.eval_shape(lambda x, of=of: of(x, bits), jax.ShapeDtypeStruct(shape, dtype)) for of in _KINDS)
        keys, values = (jax.tree.map(zeros, kind) for kind in kinds)
        newest = (repeats, slots, places, *head)
        return cls(keys, values, (jnp.zeros(newest, dtype), jnp.zeros(newest, dtype)))

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
        size, dtype = self.keys.shape[2], self.newest[0].dtype
        recent = _Recent(places.start, places.real, size)
        whole = [
            recent.joined(held[repeat][self.slots], x.astype(dtype))
            for held, x in zip(self.newest, (k, v), strict=True)
        ]
        held = self._coded(repeat, whole, recent, places)
        batch, most = self.table.shape
        read = [part.at(repeat, self.table).numbers(dtype) for part in (held.keys, held.values)]
        read = [part.reshape(batch, most * size, *part.shape[3:]) for part in read]
        keys, values = (jnp.concatenate(parts, axis=1) for parts in zip(read, whole, strict=True))
        before = jnp.broadcast_to(jnp.arange(most * size), (batch, most * size))
        at = jnp.concatenate([before, recent.positions], axis=1)
        in_full = jnp.arange(keys.shape[1]) >= most * size
        allowed = _allowed(places, at, in_full, size, options.pop("window"), options.pop("shared", 0))
        prefix = options.pop("prefix", None)
        if prefix is not None:  # before every text, and seen by all of it
            keys, values = (
                jnp.concatenate([own.astype(dtype), x], axis=1) for own, x in zip(prefix, (keys, values), strict=True)
            )
            allowed = jnp.pad(allowed, ((0, 0), (0, 0), (prefix[0].shape[1], 0)), constant_values=True)
        return _attended(q, keys, values, allowed, **options), held

    def _coded(self, repeat: int | Array, whole: list[Array], recent: "_Recent", places: Places) -> "CodedPages":
        """With the new tokens among the newest, and the pages that they fill in codes."""
        pages, size, ring = self.keys.shape[1], recent.size, self.newest[0].shape[2]
        end = places.start + jnp.sum(places.real, axis=1)
        at, most = places.positions, self.table.shape[1]
        stays = places.real & (at >= end[:, None] - ring)
        index = repeat, self.slots[:, None], jnp.where(stays, at % ring, ring)
        new = (recent.new(x) for x in whole)
        newest = tuple(held.at[index].set(x, mode="drop") for held, x in zip(self.newest, new, strict=True))
        number = recent.first[:, None] + jnp.arange(recent.fillable)
        page = jnp.take_along_axis(self.table, jnp.minimum(number, most - 1), axis=1)
        page = jnp.where((number + 1) * size <= end[:, None], page, pages)
        own = [of(recent.filled(x), self.keys.bits) for of, x in zip(_KINDS, whole, strict=True)]
        keys, values = (held.put((repeat, page), x) for held, x in zip((self.keys, self.values), own, strict=True))
        return replace(self, keys=keys, values=values, newest=newest)


_KINDS = coded_keys, coded_values


@dataclass(frozen=True)
class _Recent:
    """The page of each row that its first new token stands in, and those after it as far as new tokens may reach."""

    start: Int[Array, " batch"]
    real: Bool[Array, "batch seq"]
    size: int

    @property
    def first(self) -> Int[Array, " batch"]:
        """The first page's number in its row."""
        return self.start // self.size

    @property
    def fillable(self) -> int:
        """Pages that new tokens can fill."""
        return (self.size - 1 + self.real.shape[1]) // self.size

    @property
    def places(self) -> int:
        """Of all pages."""
        return -(-(self.size - 1 + self.real.shape[1]) // self.size) * self.size

    @property
    def positions(self) -> Int[Array, "batch places"]:
        """Of the places, in their rows."""
        return (self.first * self.size)[:, None] + jnp.arange(self.places)

    @property
    def _offsets(self) -> Int[Array, "batch seq"]:
        """The places of new tokens."""
        return (self.start % self.size)[:, None] + jnp.arange(self.real.shape[1])

    def joined(self, held: Array, new: Array) -> Float[Array, "batch places kv_heads head_dim"]:
        """What the places hold: of the newest tokens (batch, places of a slot, …), and of new ones (batch, seq, …)."""
        rows = jnp.arange(len(new))[:, None]
        before = held[rows, self.positions[:, : self.size] % held.shape[1]]
        whole = jnp.zeros((len(new), self.places, *new.shape[2:]), new.dtype).at[:, : self.size].set(before)
        return whole.at[rows, jnp.where(self.real, self._offsets, self.places)].set(new, mode="drop")

    def new(self, whole: Array) -> Array:
        """The new tokens of what the places hold."""
        return whole[jnp.arange(len(whole))[:, None], self._offsets]

    def filled(self, whole: Array) -> Float[Array, "batch pages page kv_heads head_dim"]:
        """The pages that new tokens can fill, of what the places hold."""
        pages = whole[:, : self.fillable * self.size]
        return pages.reshape(len(whole), self.fillable, self.size, *whole.shape[2:])


def _allowed(
    places: Places,
    at: Int[Array, "batch keys"],
    in_full: Bool[Array, " keys"],
    size: int,
    window: int | None,
    shared: int,
) -> Bool[Array, "batch seq keys"]:
    """Which keys, at their positions in rows, new tokens see: in codes those of pages before their own, and in full
    those of their own page.
    """
    query = places.positions[:, :, None]
    distance, pages = query - at[:, None], query // size - at[:, None] // size
    seen = jnp.where(in_full, pages == 0, pages > 0) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    if places.segment_ids is not None and places.kv_segment_ids is not None:
        documents = jnp.take_along_axis(places.kv_segment_ids, at, axis=1, mode="clip")
        seen &= (places.segment_ids[:, :, None] == documents[:, None]) | (at < shared)[:, None]
    return seen


def _attended(
    q: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch keys kv_heads head_dim"],
    values: Float[Array, "batch keys kv_heads head_dim"],
    allowed: Bool[Array, "batch seq keys"],
    *,
    scale: float | None,
    softcap: float | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention of pairs, rounded where `cramjax.kernels.attention` rounds on CPUs: the numerators, and what
    they give. So pages in full give what they give without codes, in bfloat16 too.
    """
    batch, count, heads, size = q.shape
    kv_heads = keys.shape[2]
    queries = q.astype(keys.dtype).reshape(batch, count, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    queries = row_major(queries.reshape(batch, kv_heads, -1, size))
    keys, values = (row_major(x.transpose(0, 2, 1, 3)) for x in (keys, values))
    scores = matmul(queries, transposed(keys)) * (size**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, count, -1)
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(scores.dtype).min)
    powers = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)).astype(values.dtype)
    total = jnp.sum(powers, axis=-1, keepdims=True, dtype=jnp.float32)
    mixed = matmul(powers.reshape(batch, kv_heads, -1, powers.shape[-1]), values)
    mixed = mixed.reshape(batch, kv_heads, heads // kv_heads, count, size) / total
    return mixed.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
