"""Exact parameter counts, from the declarations, and model FLOPs, by formula: what memory and utilisation divide by."""

from dataclasses import dataclass
from functools import lru_cache

import jax
from jaxtyping import PyTree

from cramjax.config import LayerConfig, ModelConfig
from cramjax.kernels.cross_entropy import tail_shares
from cramjax.model.pattern import period_of
from cramjax.model.sizes import Sizes, sizes_of
from cramjax.model.stack import weights_of


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model by part; the padding of the vocabulary is included."""

    embedding: int
    blocks: int
    head: int
    experts: int = 0
    """Those of the blocks that are in the matrices of experts."""
    idle: int = 0
    """Those of experts that a token does not go to."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.blocks + self.head

    @property
    def active(self) -> int:
        """Those that have a part in what is computed of a token."""
        return self.total - self.idle


@lru_cache(maxsize=4096)
def count_parameters(config: ModelConfig, vocab_size: int, sequence_length: int) -> ParameterCount:
    """Parameters of a model.

    Args:
        config: the model's configuration.
        vocab_size: tokens in the vocabulary, without padding.
        sequence_length: tokens per sequence.
    """
    parts = weights_of(config, vocab_size, sequence_length)
    own, blocks = config.experts, jax.tree.leaves(parts["blocks"])
    experts = sum(weight.size for weight in blocks if "expert" in weight.axes and weight.role == "matrix")
    idle = 0 if own is None else experts // own.number * (own.number - own.active)
    embedding, own_blocks, head = (_size(parts[name]) for name in ("embed", "blocks", "head"))
    return ParameterCount(embedding, own_blocks, head, experts, idle)


def train_flops_per_token(
    config: ModelConfig,
    vocab_size: int,
    sequence_length: int,
    *,
    causal: bool,
    mask_rate: float | None = None,
) -> float:
    """Model FLOPs of the matrix products of forward and backward, per token of a training sequence.

    A multiply-add is two FLOPs, and the backward pass costs twice the forward one. Attention counts only the pairs that
    the causal mask and the window leave; documents are not looked at. Experts count for the tokens that are sent to
    them: all of them together for the active ones. A tail of an adaptive softmax counts for the
    share
    of tokens it has room for. Lookups, norms and non-linearities count as nothing.

    Args:
        config: the model's configuration.
        vocab_size: tokens in the vocabulary, without padding.
        sequence_length: tokens per sequence.
        causal: each token sees only those before it.
        mask_rate: share of positions that the head predicts; None: all.
    """
    sizes = sizes_of(config, vocab_size, sequence_length)
    pairs = mean_pairs(config, sequence_length, causal=causal)
    period = period_of(config)
    block = (
        sum(_block_products(config, layer, sizes) for layer in period) / len(period)
        + 2 * pairs * sizes.heads * sizes.head_dim
    )
    predicted = 1.0 if mask_rate is None else round(mask_rate * sequence_length) / sequence_length
    head = config.width * (sizes.decoder + config.head_transform * config.width)
    for (narrow, tokens), share in zip(sizes.tails, tail_shares(len(sizes.tails)), strict=True):
        head += share * narrow * (config.width + tokens)
    return 6.0 * (config.layers * block + predicted * head)


def mean_pairs(config: ModelConfig, sequence_length: int, *, causal: bool) -> float:
    """Keys that a token attends to, on average over the sequence and the blocks of the stack.

    Args:
        config: the model's configuration.
        sequence_length: tokens.
        causal: each token sees only those before it and itself.
    """
    period = period_of(config)
    pairs = sum(attended_pairs(sequence_length, causal=causal, window=layer.window) for layer in period)
    return pairs / len(period) / sequence_length


def attended_pairs(sequence_length: int, *, causal: bool, window: int | None) -> int:
    """Pairs of query and key that attend in one sequence.

    Args:
        sequence_length: tokens.
        causal: each token sees only those before it and itself.
        window: tokens seen back, itself included (and as many forward, unless causal).
    """
    reach = min(window or sequence_length, sequence_length)
    back = reach * (reach + 1) // 2 + (sequence_length - reach) * reach
    return back if causal else 2 * back - sequence_length


def _block_products(config: ModelConfig, layer: LayerConfig, sizes: Sizes) -> int:
    """Entries of the matrices of one block that a token meets: the multiply-adds of its products."""
    attention, up, mlp = sum(sizes.qkv) + sizes.heads * sizes.head_dim, sum(sizes.up), config.mlp
    if layer.experts and config.experts is not None:
        mlp = config.experts.active * sizes.expert + sizes.shared
        up = sum(sizes.up_of(mlp)) + config.experts.number + config.experts.shared_gate  # the router's too
    return config.width * (attention + up + mlp)


def _size(weights: PyTree) -> int:
    """Numbers in all weights of a part."""
    return sum(weight.size for weight in jax.tree.leaves(weights))
