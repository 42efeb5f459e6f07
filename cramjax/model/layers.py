"""The layers of embedding, block and head, as Flax modules that other files of `model/` turn into functions.

A module declares its parameters in `__init__` (float32) and computes in the precision it is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from cramjax.config import Activation, LayerConfig, ModelConfig
from cramjax.kernels.activation import activate
from cramjax.kernels.attention import attention
from cramjax.kernels.dense import dense, projections
from cramjax.kernels.heads import normalise_and_rotate
from cramjax.kernels.lookup import lookup
from cramjax.kernels.norm import normalise, normalise_beside
from cramjax.model.pattern import rotaries_of, rotary_of
from cramjax.model.positions import bigram_buckets, sinusoids
from cramjax.model.remat import BLOCK_INPUT
from cramjax.model.sizes import Sizes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What every block of one walk reads besides its own parameters and the residual stream."""

    embedding: Float[Array, "batch seq embed"] | None = None
    """x₀, for `embedding_skip`."""
    values: Float[Array, "value_layers batch seq kv"] | None = None
    """Value embeddings of these tokens."""
    rotary: tuple[tuple[Float[Array, "rows seq 1 half"], Float[Array, "rows seq 1 half"]], ...] = ()
    """Cosines and sines of each set of rotary angles that blocks read."""
    segment_ids: Int[Array, "batch seq"] | None = None
    kv_segment_ids: Int[Array, "batch kv_seq"] | None = None
    kv_mask: Bool[Array, "batch kv_seq"] | None = None
    positions: Int[Array, "batch seq"] | None = None
    """Where the tokens stand in the cache; None outside cached decoding."""
    rng: Any = None
    """Dropout's random key; None: no dropout."""
    causal: bool = field(default=True, metadata={"static": True})


class Dense(nnx.Module):
    """A linear layer."""

    def __init__(self, inner: int, outer: int, *, std: float, bias: bool, dtype: str, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (inner, outer)))
        self.bias = nnx.Param(jnp.zeros(outer)) if bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch inner"]) -> Float[Array, "*batch outer"]:
        """Multiply, and add the bias if there is one."""
        return dense(x, self.kernel[...], self._bias, dtype=self.dtype)

    def apart(self, x: Float[Array, "*batch inner"], widths: Sequence[int]) -> tuple[Float[Array, "*batch width"], ...]:
        """The columns of the result in groups of some widths, each an array of its own."""
        return projections(x, self.kernel[...], widths, self._bias, dtype=self.dtype)

    @property
    def _bias(self) -> Array | None:
        return None if self.bias is None else self.bias[...]


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last axis, computed in float32."""

    def __init__(self, width: int, config: ModelConfig) -> None:
        centred = config.norm == "layernorm"
        self.weight = nnx.Param(jnp.ones(width)) if config.norm_affine else None
        self.bias = nnx.Param(jnp.zeros(width)) if config.norm_affine and config.norm_bias and centred else None
        self.centred, self.eps = centred, config.norm_eps

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Normalise the last axis."""
        return normalise(x, *self._affine, centred=self.centred, eps=self.eps)

    def beside(
        self, x: Float[Array, "*batch embed"]
    ) -> tuple[Float[Array, "*batch embed"], Float[Array, "*batch embed"]]:
        """`x`, and `x` normalised, for a branch beside a stream."""
        return normalise_beside(x, *self._affine, centred=self.centred, eps=self.eps)

    @property
    def _affine(self) -> tuple[Array | None, Array | None]:
        weight = None if self.weight is None else self.weight[...]
        return weight, None if self.bias is None else self.bias[...]


class Table(nnx.Module):
    """Rows looked up by number."""

    def __init__(self, *shape: int, std: float, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(std * jax.random.normal(rngs.params(), shape))

    def __call__(self, rows: Int[Array, "batch seq"]) -> Float[Array, "*stack batch seq embed"]:
        """Look up rows; a number past the end reads the last one."""
        return lookup(self.table[...], rows)

    def within(self, rows: Int[Array, "rows seq"]) -> Float[Array, "rows seq embed"]:
        """Look up rows; a number past the end gives NaN."""
        return nan_past(self(rows), rows, len(self.table[...]))


class SinusoidalPositions(nnx.Module):
    """Fixed sinusoids times one learned scalar that starts at width^-½ (Geiping & Goldstein 2022; µP: base width)."""

    def __init__(self, rows: int, width: int, base_width: int) -> None:
        self.scale = nnx.Param(jnp.asarray(base_width**-0.5))
        self.rows, self.width = rows, width

    def __call__(self, positions: Int[Array, "*batch"]) -> Float[Array, "*batch embed"]:
        """Embed positions; one past the end gives NaN."""
        return self.scale[...] * self._table.at[positions].get(mode="fill", fill_value=jnp.nan)

    within = __call__

    @property
    def _table(self) -> Float[Array, "rows embed"]:
        return jnp.asarray(sinusoids(self.rows, self.width))


class Embedding(nnx.Module):
    """Tokens to the residual stream: token, position, type and bigram embeddings, summed and normalised."""

    def __init__(self, config: ModelConfig, sizes: Sizes, *, dtype: str, rngs: nnx.Rngs) -> None:
        std = sizes.outer_std
        self.token = Table(sizes.vocab, config.width, std=std, rngs=rngs)
        # Flax wants each attribute assigned once.
        match config.positions:
            case "learned":
                self.position = Table(sizes.positions, config.width, std=std, rngs=rngs)
            case "sinusoidal":
                self.position = SinusoidalPositions(
                    sizes.positions, config.width, config.mup_base_width or config.width
                )
            case _:
                self.position = None
        self.token_type = Table(config.token_types, config.width, std=std, rngs=rngs) if config.token_types else None
        self.bigram = Table(config.bigram_buckets, config.width, std=0.0, rngs=rngs) if config.bigram_buckets else None
        value_shape = (sizes.value_layers, sizes.vocab, sizes.kv_heads * sizes.head_dim)
        self.value = Table(*value_shape, std=std, rngs=rngs) if config.value_embeddings else None
        self.norm = Norm(config.width, config) if config.embedding_norm else None
        self.buckets, self.scale, self.dtype = config.bigram_buckets, config.embedding_scale, dtype

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "rows seq"],
        previous: Int[Array, " batch"] | None,
        rows: Float[Array, "batch seq embed"] | None = None,
        token_types: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """Embed tokens at positions; `previous` is the token before each row, for bigrams (None: there is none),
        `rows` those of the token table, where they have been looked up, and `token_types` rows of the table of types
        (None: 0).
        """
        x = self.token(tokens) if rows is None else rows
        x = x if self.scale == 1 else self.scale * x
        if self.position is not None:
            x = x + self.position.within(positions)
        if self.token_type is not None:
            x = x + (self.token_type.table[...][0] if token_types is None else self.token_type(token_types))
        if self.bigram is not None:
            x = x + self.bigram(bigram_buckets(tokens, previous, self.buckets))
        x = x.astype(self.dtype)
        return x if self.norm is None else self.norm(x)

    def values(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "value_layers batch seq kv"] | None:
        """Value embeddings of the tokens for every layer that has them."""
        if self.value is None:
            return None
        return self.value(tokens).astype(self.dtype)


class Attention(nnx.Module):
    """Self-attention with grouped-query heads and a fused query-key-value projection."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, sizes: Sizes, *, dtype: str, rngs: nnx.Rngs) -> None:
        inner = sizes.heads * sizes.head_dim
        bias = config.bias or config.qkv_bias
        self.qkv = Dense(config.width, sum(sizes.qkv), std=sizes.std(config.width), bias=bias, dtype=dtype, rngs=rngs)
        self.out = Dense(inner, config.width, std=sizes.output_std(inner), bias=config.bias, dtype=dtype, rngs=rngs)
        self.query_norm = HeadNorm(sizes.head_dim) if config.qk_norm_weight else None
        self.key_norm = HeadNorm(sizes.head_dim) if config.qk_norm_weight else None
        self.value_gate = nnx.Param(jnp.ones(())) if config.value_embeddings else None
        self.sizes, self.eps = sizes, config.norm_eps if config.qk_norm else None
        self.window, self.softcap = layer.window, config.attention_softcap
        rotary = rotary_of(layer)
        self.rotary = None if rotary is None else rotaries_of(config).index(rotary)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        context: Context,
        value: Float[Array, "batch seq kv"] | None,
        cache: tuple[Array, Array, Array | int] | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], tuple[Array, Array] | None]:
        """Attend within `x`, or within a cache that `x` is first written to.

        Args:
            x: normalised input (batch, seq, embed).
            context: masks, rotary angles and positions.
            value: value embeddings of this layer, or None.
            cache: keys and values of all layers (layer, batch, length, kv_heads, head_dim), and this layer's index.

        Returns:
            The output (batch, seq, embed), and the updated cache.
        """
        sizes = self.sizes
        batch, length, _ = x.shape
        queries, keys, values = sizes.qkv

        def heads(widths: Sequence[int]) -> list[Array]:
            parts = checkpoint_name(self.qkv.apart(x, widths), "qkv")
            return [part.reshape(batch, length, -1, sizes.head_dim) for part in parts]

        rotary = None if self.rotary is None else context.rotary[self.rotary]
        if self.eps is not None or rotary is not None:
            qk, v = heads((queries + keys, values))
            weights = None
            if self.query_norm is not None and self.key_norm is not None:
                weights = self.query_norm.weight[...], self.key_norm.weight[...]
            q, k = normalise_and_rotate(qk, sizes.heads, rotary, eps=self.eps, weights=weights)
        else:
            q, k, v = heads((queries, keys, values))
        if self.value_gate is not None and value is not None:
            v = v + self.value_gate[...].astype(v.dtype) * value.reshape(v.shape)
        written = None
        if cache is not None:
            stored_keys, stored_values, layer = cache
            places = (layer, jnp.arange(batch)[:, None], context.positions)
            stored_keys = stored_keys.at[places].set(k.astype(stored_keys.dtype), mode="drop")
            stored_values = stored_values.at[places].set(v.astype(stored_values.dtype), mode="drop")
            written = stored_keys, stored_values
            k, v = stored_keys[layer], stored_values[layer]
        mixed = attention(
            q,
            k,
            v,
            causal=context.causal,
            window=self.window,
            segment_ids=context.segment_ids,
            kv_segment_ids=context.kv_segment_ids,
            kv_mask=context.kv_mask,
            query_positions=context.positions,
            scale=sizes.attention_scale,
            softcap=self.softcap,
        )
        return checkpoint_name(self.out(mixed.reshape(batch, length, -1)), "attention_out"), written


class HeadNorm(nnx.Module):
    """The weight of a norm of heads, applied by their kernel."""

    def __init__(self, head_dim: int) -> None:
        self.weight = nnx.Param(jnp.ones(head_dim))


class FeedForward(nnx.Module):
    """Two projections around a non-linearity, gated or not."""

    def __init__(self, config: ModelConfig, sizes: Sizes, *, dtype: str, rngs: nnx.Rngs) -> None:
        self.up = Dense(
            config.width, sum(sizes.up), std=sizes.std(config.width), bias=config.bias, dtype=dtype, rngs=rngs
        )
        self.down = Dense(
            config.mlp, config.width, std=sizes.output_std(config.mlp), bias=config.bias, dtype=dtype, rngs=rngs
        )
        self.activation: Activation = config.activation

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        """Transform each token by itself."""
        h = checkpoint_name(self.up(x), "up")
        return checkpoint_name(self.down(activate(self.activation, h)), "down")


class Skip(nnx.Module):
    """Learned mixture of the residual stream and the embedding; it starts as the stream alone."""

    def __init__(self) -> None:
        self.stream = nnx.Param(jnp.ones(()))
        self.embedding = nnx.Param(jnp.zeros(()))

    def __call__(
        self, x: Float[Array, "batch seq embed"], embedding: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        """Mix the stream with the embedding."""
        return self.stream[...].astype(x.dtype) * x + self.embedding[...].astype(x.dtype) * embedding


class Block(nnx.Module):
    """Attention and feed-forward around the residual stream: the unit of everything."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, sizes: Sizes, *, dtype: str, rngs: nnx.Rngs) -> None:
        self.skip = Skip() if config.embedding_skip else None
        self.attention_norm = Norm(config.width, config) if layer.attention_norm else None
        self.attention = Attention(config, layer, sizes, dtype=dtype, rngs=rngs)
        self.mlp_norm = Norm(config.width, config)
        self.mlp = FeedForward(config, sizes, dtype=dtype, rngs=rngs)
        sandwich = config.norm_position == "sandwich"
        self.attention_out_norm = Norm(config.width, config) if sandwich else None
        self.mlp_out_norm = Norm(config.width, config) if sandwich else None
        self.pre, self.dropout = config.norm_position != "post", config.dropout

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        context: Context,
        value: Float[Array, "batch seq kv"] | None,
        cache: tuple[Array, Array, Array | int] | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], tuple[Array, Array] | None]:
        """One step of the walk; arguments as of `Attention`."""
        first, second = (None, None) if context.rng is None else jax.random.split(context.rng)
        x = checkpoint_name(x, BLOCK_INPUT)
        if self.skip is not None and context.embedding is not None:
            x = self.skip(x, context.embedding)
        with jax.named_scope("attention"):
            x, read = self.attention_norm.beside(x) if self.pre and self.attention_norm is not None else (x, x)
            mixed, written = self.attention(read, context, value, cache)
            mixed = mixed if self.attention_out_norm is None else self.attention_out_norm(mixed)
        x = added(x, dropout(mixed, self.dropout, first))
        if not self.pre and self.attention_norm is not None:
            x = self.attention_norm(x)
        with jax.named_scope("mlp"):
            x, read = self.mlp_norm.beside(x) if self.pre else (x, x)
            changed = self.mlp(read)
            changed = changed if self.mlp_out_norm is None else self.mlp_out_norm(changed)
        x = added(x, dropout(changed, self.dropout, second))
        return (x if self.pre else self.mlp_norm(x)), written


class HeadTransform(nnx.Module):
    """BERT's dense + GELU + LayerNorm before the decoder."""

    def __init__(self, config: ModelConfig, sizes: Sizes, *, dtype: str, rngs: nnx.Rngs) -> None:
        width = config.width
        bias = config.head_transform_bias
        self.dense = Dense(width, width, std=sizes.std(width), bias=bias, dtype=dtype, rngs=rngs)
        self.norm = Norm(width, config)

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Transform what the decoder will read."""
        return self.norm(jax.nn.gelu(self.dense(x), approximate=False))


class Decoder(nnx.Module):
    """The untied matrix to the vocabulary, and its bias; the cross entropy kernel applies them."""

    def __init__(self, config: ModelConfig, sizes: Sizes, *, rngs: nnx.Rngs) -> None:
        std, shape = sizes.outer_std, (config.width, sizes.decoder)
        self.kernel = None if config.tied else nnx.Param(std * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(sizes.vocab)) if config.head_bias else None


class TailHead(nnx.Module):
    """A tail of an adaptive softmax: down to a narrower width, then to its own tokens."""

    def __init__(self, config: ModelConfig, sizes: Sizes, index: int, *, rngs: nnx.Rngs) -> None:
        narrow, tokens = sizes.tails[index]
        self.down = Kernel(config.width, narrow, std=sizes.std(config.width), rngs=rngs)
        self.decoder = Kernel(narrow, tokens, std=sizes.std(narrow), rngs=rngs)


class Kernel(nnx.Module):
    """A bare matrix, applied elsewhere."""

    def __init__(self, inputs: int, outputs: int, *, std: float, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (inputs, outputs)))


class Head(nnx.Module):
    """The residual stream to what the decoder reads."""

    def __init__(self, config: ModelConfig, sizes: Sizes, *, dtype: str, rngs: nnx.Rngs) -> None:
        self.norm = Norm(config.width, config) if config.final_norm else None
        self.transform = HeadTransform(config, sizes, dtype=dtype, rngs=rngs) if config.head_transform else None
        self.decoder = Decoder(config, sizes, rngs=rngs)
        self.width_ratio = sizes.width_ratio
        for index in range(len(sizes.tails)):
            setattr(self, f"tail{index}", TailHead(config, sizes, index, rngs=rngs))

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Normalise and transform the residual stream; under µP, divide it by the width ratio (but not the bias)."""
        x = x if self.norm is None else self.norm(x)
        x = x if self.transform is None else self.transform(x)
        return x if self.width_ratio == 1 else x / self.width_ratio


def added(
    x: Float[Array, "batch seq embed"], change: Float[Array, "batch seq embed"]
) -> Float[Array, "batch seq embed"]:
    """The residual stream after a branch.

    It is summed as the rows that the branch's last product gives: cuBLAS then adds the stream as it multiplies. Seen
    through a change of shape, XLA would take the stream for the product's own to overwrite, and copy it first.
    """
    rows = x.reshape(-1, x.shape[-1]) + change.reshape(-1, x.shape[-1])
    return rows.reshape(x.shape)


def nan_past(
    x: Float[Array, "rows seq embed"], positions: Int[Array, "rows seq"], length: int
) -> Float[Array, "rows seq embed"]:
    """NaN in the place of tokens whose positions are not below `length`: what is not there is not guessed."""
    return jnp.where((positions < length)[..., None], x, jnp.nan)


def dropout(x: Float[Array, "*shape"], rate: float, rng: Any) -> Float[Array, "*shape"]:
    """Zero entries with probability `rate` and scale the others up; without a key, nothing."""
    if rng is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
