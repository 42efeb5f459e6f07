"""Text in, batches of tokens out: sources → clean → tokenize → token files → sequences. Imports no jax."""

from cramjax.data.clean import normalize
from cramjax.data.loader import Dealer, Prefetcher, Sequences, require_sequences
from cramjax.data.prepare import prepare, prepared_already
from cramjax.data.store import PreparedData, TokenFile
from cramjax.data.tokenizer import Tokenizer, require_mask

__all__ = [
    "Dealer",
    "Prefetcher",
    "PreparedData",
    "Sequences",
    "TokenFile",
    "Tokenizer",
    "normalize",
    "prepare",
    "prepared_already",
    "require_mask",
    "require_sequences",
]
