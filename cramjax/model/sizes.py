"""The numbers that a model configuration, a vocabulary and a sequence length imply.

µP is here too, as far as it concerns the model: initial scales, the scale of attention, and the width ratio by which
the head divides and the optimizer's groups differ (Yang et al. 2022, arXiv:2203.03466, table 8). At the base width
every number is that of the standard parametrisation.
"""

import math
from dataclasses import dataclass

from cramjax.config import GATED, ModelConfig


@dataclass(frozen=True)
class Sizes:
    """Shapes and initial scales of a model's parameters."""

    vocab: int
    """Rows of the vocabulary, padding included."""
    positions: int
    """Rows of a table of positions."""
    heads: int
    kv_heads: int
    head_dim: int
    value_layers: int
    """Layers with value embeddings."""
    qkv: tuple[int, int, int]
    """Columns of queries, keys and values in the fused projection."""
    decoder: int
    """Columns of the decoder: the vocabulary, an adaptive softmax's short list and one for each tail, or none where
    there is a classifier in its place."""
    tails: tuple[tuple[int, int], ...]
    """Width and tokens of each tail of an adaptive softmax."""
    gated: bool
    """Whether the feed-forward layer reads a gate beside what it lets through."""
    up: tuple[int, ...]
    """Columns of the first feed-forward projection: (mlp,), or gate and value."""
    expert: int
    """Hidden width of an expert; 0: there are none."""
    shared: int
    """Hidden width of what all tokens go to beside their experts."""
    init_std: float | None
    outer_std: float
    """Initial standard deviation of embeddings and decoder, which µP keeps as it is at the base width."""
    output_scale: float
    """Multiplies the initial scale of the sublayers' output projections."""
    width_ratio: float
    """Width over µP's base width; 1 in the standard parametrisation. What the decoder reads is divided by it."""
    attention_scale: float
    """Multiplies the attention scores: as configured, else 1 / sqrt(head_dim), under µP 1 / head_dim beyond the base
    head."""

    def up_of(self, width: int) -> tuple[int, ...]:
        """Columns of the first projection of a feed-forward layer of some hidden width."""
        return (width, width) if self.gated else (width,)

    def std(self, fan_in: int) -> float:
        """Initial standard deviation of a hidden matrix: its variance is ∝ 1 / fan_in under µP."""
        return 1 / math.sqrt(fan_in) if self.init_std is None else self.init_std / math.sqrt(self.width_ratio)

    def output_std(self, fan_in: int) -> float:
        """Initial standard deviation of a sublayer's output projection."""
        return self.output_scale * self.std(fan_in)


def sizes_of(config: ModelConfig, vocab_size: int, sequence_length: int) -> Sizes:
    """The sizes of a model.

    Args:
        config: the model's configuration.
        vocab_size: tokens in the vocabulary, without padding.
        sequence_length: tokens per sequence.
    """
    heads, kv_heads = config.heads, config.kv_heads or config.heads
    head_dim = config.head_dim or config.width // heads
    gated, experts = config.activation in GATED, config.experts
    expert = 0 if experts is None else experts.width or config.mlp // (experts.active + experts.shared)
    output_scale = 1 / math.sqrt(2 * config.layers) if config.depth_scaled_init else 1.0
    vocab = -(-vocab_size // config.vocab_multiple) * config.vocab_multiple
    cuts = (*(cut for cut in config.adaptive_head if cut < vocab_size), vocab)
    tails = tuple((config.width >> (i + 1), cuts[i + 1] - cuts[i]) for i in range(len(cuts) - 1))
    decoder = cuts[0] + len(tails)
    if config.classifier is not None:
        tails, decoder = (), 0
    return Sizes(
        vocab=vocab,
        decoder=decoder,
        tails=tails,
        positions=config.max_positions or sequence_length,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_layers=-(-config.layers // 2) if config.value_embeddings else 0,
        qkv=(heads * head_dim, kv_heads * head_dim, kv_heads * head_dim),
        gated=gated,
        up=(config.mlp, config.mlp) if gated else (config.mlp,),
        expert=expert,
        shared=0 if experts is None else experts.shared * expert,
        init_std=config.init_std,
        outer_std=1 / math.sqrt(config.mup_base_width or config.width) if config.init_std is None else config.init_std,
        output_scale=0.0 if config.zero_init_outputs else output_scale,
        width_ratio=width_ratio(config),
        attention_scale=config.attention_scale
        or head_dim**-0.5 * ((config.mup_base_head_dim or head_dim) / head_dim) ** 0.5,
    )


def width_ratio(config: ModelConfig) -> float:
    """How many times wider than µP's base a model is; 1 in the standard parametrisation."""
    return config.width / (config.mup_base_width or config.width)
