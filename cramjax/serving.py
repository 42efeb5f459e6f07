"""How models are served, as a configuration. Imports no jax."""

from dataclasses import dataclass
from typing import Literal

from cramjax.ranges import Count, Natural, NotNegative


@dataclass(frozen=True)
class EngineConfig:
    """What the engine may take, and how it works."""

    slots: Count = 8
    """Requests in progress at once; more of them wait."""
    context: Count | None = None
    """Most tokens of prompt and answer together. Default: what the model sees, at most 4096."""
    page: Count | None = None
    """Tokens of a page of keys and values. Default: 16, or 64 with `cache_bits`: keys of a page share a step."""
    cache_bits: Literal[8, 4, 2] | None = None
    """Bits in which keys and values are held, but for the newest page of each request (KIVI): more pages in the same
    memory. 4 cost little, 2 much. Attention is XLA's then, which on CPUs is slower for many requests. It is for what is
    served: `cramjax generate` holds them in full. Default: in full."""
    cache_tokens: Count | None = None
    """Tokens whose keys and values are held for all requests together. Default: four contexts, or as many as there are
    slots; with `cache_bits`, what the same memory holds."""
    prefix_cache: bool = True
    """Keep the keys and values of texts that ended, for requests that begin alike."""
    lookup: Natural = 0
    """Tokens guessed at once where a text repeats itself, and verified in one call (prompt look-up); 0: none. 7 suits
    code and quotations; on a CPU, whose kernel for a few rows takes 8."""
    draft: str | None = None
    """A smaller model with the same tokenizer, a run or a model directory, that guesses tokens for this one to verify:
    the answer is the same. It pays where the small one is many times faster and often right."""
    draft_tokens: Count = 4
    """Tokens that `draft` guesses at once."""
    deterministic: bool = False
    """Answer each request as if it were alone: every call has one shape. Slower, and without prefix cache."""
    patience: NotNegative = 0.0
    """Of a model served for its embeddings: seconds that a text waits for the company of others while nothing is
    computed (a lazy trigger); 0: none does (a hungry one)."""

    @property
    def guesses(self) -> int:
        """Tokens that are guessed at once; 0: none are."""
        return self.lookup if self.draft is None else self.draft_tokens

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return self.page or (16 if self.cache_bits is None else 64)
