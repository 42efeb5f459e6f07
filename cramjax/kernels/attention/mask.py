"""Which keys a query may see: causality, sliding window, packed documents and padding, for any block of pairs."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@dataclass(frozen=True)
class Mask:
    """The pairs of query and key that attend.

    Queries stand at positions 0, 1, … among the keys unless `query_positions` places them.
    """

    causal: bool = False
    """A query sees no later key."""
    window: int | None = None
    """A query sees keys less than this many positions away, itself included."""
    query_segment_ids: Int[Array, "batch seq"] | None = None
    kv_segment_ids: Int[Array, "batch kv_seq"] | None = None
    """Documents: a query sees keys of its own segment."""
    kv_mask: Bool[Array, "batch kv_seq"] | None = None
    """False where a key is padding."""
    query_positions: Int[Array, "rows seq"] | None = None
    """Index of each query among the keys; one row serves a whole batch."""
    shared: int = 0
    """The first keys, so many, belong to every document."""

    def block(self, queries: tuple[int, int], keys: tuple[int, int]) -> Bool[Array, "batch seq kv_seq"] | None:
        """The mask of a range of queries against a range of keys; its batch axis may be 1. None when all attend."""
        parts = [part for part in (self._positions(queries, keys), self._segments(queries, keys)) if part is not None]
        if self.kv_mask is not None:
            parts.append(self.kv_mask[:, None, slice(*keys)])
        if not parts:
            return None
        mask = jnp.asarray(parts[0])
        for part in parts[1:]:
            mask = mask & part
        return mask

    def visible_keys(self, queries: tuple[int, int], kv_length: int) -> tuple[int, int]:
        """The static range of keys outside which no query of [start, stop) sees anything."""
        if self.query_positions is not None:
            return 0, kv_length
        start, stop = 0, kv_length
        if self.window is not None:
            start, stop = max(0, queries[0] - self.window + 1), min(stop, queries[1] + self.window - 1)
        if self.causal:
            stop = min(stop, queries[1])
        return min(start, kv_length), max(stop, min(start, kv_length))

    @property
    def skips(self) -> bool:
        """Whether a chunk of queries statically sees fewer than all keys."""
        return self.query_positions is None and (self.causal or self.window is not None)

    def may_hide_all(self, queries: tuple[int, int], keys: tuple[int, int]) -> bool:
        """Whether a query of the block may see no key at all; a token that attends to itself cannot."""
        if self.kv_mask is not None or self.query_positions is not None:
            return True
        return self.kv_segment_ids is not self.query_segment_ids or queries[1] > keys[1]

    def _positions(self, queries: tuple[int, int], keys: tuple[int, int]) -> Bool[Array, "batch seq kv_seq"] | None:
        if not self.causal and self.window is None:
            return None
        if self.query_positions is None:
            distance = np.arange(*queries)[None, :, None] - np.arange(*keys)
        else:
            distance = self.query_positions[:, slice(*queries), None] - jnp.arange(*keys, dtype=jnp.int32)
        near = distance < self.window if self.window is not None else distance == distance
        if self.causal:
            near = near & (distance >= 0)
        elif self.window is not None:
            near = near & (-distance < self.window)
        if isinstance(near, np.ndarray) and near.all():
            return None
        return jnp.asarray(near)

    def _segments(self, queries: tuple[int, int], keys: tuple[int, int]) -> Bool[Array, "batch seq kv_seq"] | None:
        if self.query_segment_ids is None or self.kv_segment_ids is None:
            return None
        same = self.query_segment_ids[:, slice(*queries), None] == self.kv_segment_ids[:, None, slice(*keys)]
        return same | jnp.asarray(np.arange(*keys) < self.shared) if keys[0] < self.shared else same
