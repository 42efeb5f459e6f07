"""Texts of any lengths in one buffer, without padding between them: where each lies, and attention within each.

A text's tokens stand beside each other, from the sum of the lengths before it on (prefix sums, made once on the host).
Everything but attention reads the buffer as it is; attention reads rows that are as long as the longest text, and puts
what it makes back. Where the buffer has a place for every token of such rows, the texts lie that far apart, and the
two are one array: so padded batches are a case of this one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from cramjax.kernels.attention import attention


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ragged:
    """Some texts in one buffer. Texts of no tokens fill up their number, and tokens of no text the buffer."""

    tokens: Any
    """Ids, int32 (places,); 0 where no text is."""
    positions: Any
    """Of each token in its text, int32 (places,)."""
    types: Any
    """Which of two texts each token is of, int32 (places,); None: 0."""
    starts: Any
    """Where each text begins, int32 (texts,)."""
    lengths: Any
    """Tokens of each text, int32 (texts,)."""
    origins: Any
    """Of each token in the flattened rows of `apart`, int32 (places,)."""
    longest: int = field(metadata={"static": True})
    """Tokens of a row of `apart`."""

    @property
    def is_padded(self) -> bool:
        """Whether the texts lie so far apart that the buffer is `apart`'s rows."""
        return len(self.tokens) == len(self.starts) * self.longest

    @property
    def real(self) -> Bool[Array, "texts longest"]:
        """Where rows hold a token."""
        return jnp.arange(self.longest) < self.lengths[:, None]

    def apart(self, x: Shaped[Array, "places *rest"]) -> Shaped[Array, "texts longest *rest"]:
        """Each text as a row of its own; what stands behind a text means nothing."""
        if self.is_padded:
            return x.reshape(len(self.starts), self.longest, *x.shape[1:])
        return jnp.take(x, self.starts[:, None] + jnp.arange(self.longest), axis=0, mode="clip")

    def joined(self, x: Shaped[Array, "texts longest *rest"]) -> Shaped[Array, "places *rest"]:
        """Rows as one buffer: the inverse of `apart`."""
        flat = x.reshape(-1, *x.shape[2:])
        return flat if self.is_padded else jnp.take(flat, self.origins, axis=0, mode="clip")

    def attend(
        self,
        q: Float[Array, "1 places heads head_dim"],
        k: Float[Array, "1 places kv_heads head_dim"],
        v: Float[Array, "1 places kv_heads head_dim"],
        *,
        causal: bool,
        segment_ids: Shaped[Array, "1 places"] | None,
        **options: Any,
    ) -> Float[Array, "1 places heads head_dim"]:
        """Attention within each text; arguments as of `cramjax.kernels.attention.attention`."""
        documents = None if segment_ids is None else self.apart(segment_ids[0])
        # What stands behind a text comes after all that is asked of a causal model.
        hidden = {"segment_ids": documents, "kv_mask": None if causal else self.real}
        rows = [self.apart(x[0]) for x in (q, k, v)]
        return self.joined(attention(*rows, causal=causal, **hidden, **options))[None]


def ragged(
    texts: Sequence[Sequence[int]],
    *,
    places: int,
    rows: int,
    longest: int,
    types: Sequence[Sequence[int]] | None = None,
) -> Ragged:
    """Put texts into a buffer.

    Args:
        texts: ids of each, in the order in which they will lie.
        places: of the buffer; `rows * longest` for a padded batch.
        rows: texts that there is room for.
        longest: tokens of a text that there is room for.
        types: which of two texts each token is of. Default: none are told apart.

    Raises:
        ValueError: the texts do not fit.
    """
    lengths = np.array([len(text) for text in texts], np.int32)
    padded = places == rows * longest
    if len(texts) > rows or lengths.max(initial=0) > longest or (not padded and lengths.sum() > places):
        raise ValueError(
            f"{len(texts)} texts of {lengths.sum()} tokens, {lengths.max(initial=0)} the longest, do not fit {rows} "
            f"rows of {longest} in {places} places"
        )
    before = np.cumsum(lengths) - lengths
    starts = np.arange(len(texts)) * longest if padded else before
    number = np.repeat(np.arange(len(texts)), lengths)
    within = np.arange(lengths.sum()) - before[number]
    at = starts[number] + within

    def placed(values: np.ndarray) -> np.ndarray:
        buffer = np.zeros(places, np.int32)
        buffer[at] = values
        return buffer

    def flat(rows: Sequence[Sequence[int]]) -> np.ndarray:
        return np.concatenate([np.asarray(row, np.int32) for row in rows]) if rows else np.zeros(0, np.int32)

    room = (0, rows - len(texts))
    return Ragged(
        tokens=placed(flat(texts)),
        positions=placed(within),
        types=None if types is None else placed(flat(types)),
        starts=np.pad(starts, room).astype(np.int32),
        lengths=np.pad(lengths, room),
        origins=placed(number * longest + within),
        longest=longest,
    )
