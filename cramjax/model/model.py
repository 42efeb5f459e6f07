"""A configured model: the stack, with the walks over it and the readout as methods."""

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Array, Float, Int, PyTree

from cramjax.adapters import AdapterConfig
from cramjax.config import ModelConfig, Remat
from cramjax.errors import ConfigError
from cramjax.kernels import rows
from cramjax.kernels.cross_entropy import CrossEntropySums
from cramjax.model import decode, readout, unpadded, walk
from cramjax.model.decode import TextCache
from cramjax.model.ragged import Ragged
from cramjax.model.sizes import sizes_of
from cramjax.model.stack import Stack, unrolls


@dataclass(frozen=True)
class Model(Stack):
    """What most callers want of a stack. Each method is the function of its name in `walk`, `readout` or `decode`, or
    the walk of `unpadded`.
    """

    def stream(self, params: PyTree, tokens: Int[Array, "batch seq"], **seen: Any) -> Float[Array, "batch seq embed"]:
        """The residual stream after the last block; `seen` as of `embed`."""
        return walk.stream(self, params, tokens, **seen)

    def unpadded(self, params: PyTree, texts: Ragged) -> Float[Array, "places embed"]:
        """The residual stream after the last block, of texts in one buffer."""
        return unpadded.stream(self, params, texts)

    def hidden(self, params: PyTree, tokens: Int[Array, "batch seq"], **seen: Any) -> Float[Array, "batch seq embed"]:
        """What the decoder reads; `seen` as of `embed`."""
        return walk.hidden(self, params, tokens, **seen)

    def loss_sums(
        self,
        params: PyTree,
        hidden: Float[Array, "tokens embed"],
        targets: Int[Array, " tokens"],
        token_weights: Float[Array, " tokens"] | None = None,
        *,
        z_loss: float = 0.0,
    ) -> CrossEntropySums:
        """Summed cross entropy of predictions."""
        return readout.loss_sums(self, params, hidden, targets, token_weights, z_loss=z_loss)

    def logits(self, params: PyTree, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Logits of the real vocabulary, float32; of an adaptive softmax, log-probabilities."""
        return readout.logits(self, params, hidden)

    def init_cache(self, batch: int, length: int, params: PyTree | None = None) -> TextCache:
        """An empty cache for so many rows of at most so many tokens; with a prompt it is of these parameters."""
        return decode.init_cache(self, batch, length, params)

    def decode(
        self,
        params: PyTree,
        cache: TextCache,
        tokens: Int[Array, "batch seq"],
        counts: Int[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], TextCache]:
        """Continue each row of a cache by some tokens."""
        return decode.decode(self, params, cache, tokens, counts)


def make_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    sequence_length: int,
    causal: bool,
    separator_id: int | None = None,
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
    layer_loop: Literal["auto", "scan", "unroll"] = "auto",
    remat: Remat = "none",
    param_dtype: Literal["float32", "bfloat16"] = "float32",
    adapter: AdapterConfig | None = None,
) -> Model:
    """The model that a configuration describes.

    Args:
        config: architecture.
        vocab_size: tokens in the vocabulary, without padding.
        sequence_length: tokens per sequence in training.
        causal: each token sees only those before it.
        separator_id: token that stands before and after each document; needed by `mask_documents`.
        compute_dtype: precision of activations and matrix products.
        layer_loop: walk the stack with `scan` or unrolled, or as `unrolls` says for the device that is traced for.
        remat: what the backward pass recomputes of each block.
        param_dtype: precision of the parameters.
        adapter: what is trained beside them; None: they themselves.

    Raises:
        ConfigError: options that exclude each other.
    """
    if config.mask_documents and separator_id is None:
        raise ConfigError("model.mask_documents needs a separator token, and the tokenizer has none: set it to false.")
    if config.bigram_buckets and not causal:
        raise ConfigError("model.bigram_buckets works for causal models only, got a masked one: set it to 0.")
    sizes = sizes_of(config, vocab_size, sequence_length)
    if config.positions in ("learned", "sinusoidal") and sizes.positions < sequence_length:
        raise ConfigError(
            f"model.max_positions must be at least the sequence length {sequence_length}, got {sizes.positions}."
        )
    return Model(
        config=config,
        vocab_size=vocab_size,
        sequence_length=sequence_length,
        causal=causal,
        separator_id=separator_id,
        compute_dtype=compute_dtype,
        unroll=unrolls(layer_loop, config.layers, remat, kernels=rows.refusal_here() is None),
        remat=remat,
        param_dtype=param_dtype,
        adapter=adapter,
    )
