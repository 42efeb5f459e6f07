"""How a model makes one vector of a text, as a part of its description. Imports no jax."""

from dataclasses import dataclass
from typing import Literal

from cramjax.ranges import Count

Pooling = Literal["mean", "cls", "last"]
"""The vector of a text: the mean of its tokens', the first token's, or the last one's."""


@dataclass(frozen=True)
class EmbeddingConfig:
    """How the vectors of a text's tokens become one."""

    pooling: Pooling = "mean"
    """The mean of all tokens' vectors, the first token's or the last one's."""
    normalise: bool = True
    """Whether embeddings have length 1."""
    max_tokens: Count | None = None
    """Most tokens of a text, those around it included. null: the context."""
