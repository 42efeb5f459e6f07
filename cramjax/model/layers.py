"""The layers of embedding, block and head, as Flax modules that other files of `model/` turn into functions.

A module declares its parameters in `__init__` (float32; `cramjax.model.weights`) and computes in the precision it is
given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PyTree

from cramjax.config import Activation, LayerConfig, ModelConfig
from cramjax.errors import ConfigError
from cramjax.kernels.activation import activate
from cramjax.kernels.attention import attention
from cramjax.kernels.dense import dense, projections
from cramjax.kernels.heads import normalise_and_rotate
from cramjax.kernels.norm import normalise, normalise_beside
from cramjax.kernels.packed import prefix_of
from cramjax.model.cache import Cache, Places, after_prefix
from cramjax.model.pattern import rotaries_of, rotary_of
from cramjax.model.ragged import Ragged
from cramjax.model.sizes import Sizes
from cramjax.model.weights import Constant, Normal, Weight

NO_VIRTUAL_TOKENS = (
    "The model has blocks with a sliding window, which would lose sight of virtual tokens (adapter.kind is prompt or "
    "prefix): choose lora or ia3."
)


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
    kv_mask: Bool[Array, "batch seq"] | None = None
    places: Places | None = None
    """Where the tokens stand in a cache; None outside cached decoding."""
    texts: Ragged | None = None
    """Where texts lie in the one row that `x` is; None: each row is a text."""
    rng: Any = None
    """Dropout's random key; None: no dropout."""
    causal: bool = field(default=True, metadata={"static": True})
    shared: int = field(default=0, metadata={"static": True})
    """Virtual tokens before the first, which every document sees."""


def declare(weight: Weight, rngs: nnx.Rngs | None) -> nnx.Param[Any]:
    """A parameter of a layer, with its declaration beside it.

    Args:
        weight: the declaration.
        rngs: random keys, of which a weight that starts at random takes the next. None: the parameter is a shape.
    """
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(weight.shape, jnp.float32), weight=weight)
    return nnx.Param(weight.drawn(rngs.params() if isinstance(weight.init, Normal) else None), weight=weight)


def declared(module: nnx.Module) -> PyTree:
    """The tree of `Weight`s of a layer, in the structure of its parameters."""
    weights: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, nnx.Param):
            weights[name] = value.get_metadata()["weight"]
        elif isinstance(value, nnx.Module) and (inner := declared(value)):
            weights[name] = inner
    return weights


class Dense(nnx.Module):
    """A linear layer; `axes` are the logical axes of its inputs and outputs, `widths` what it has side by side."""

    def __init__(
        self,
        inner: int,
        outer: int | Sequence[int],
        axes: tuple[str, str],
        *,
        std: float,
        bias: bool,
        dtype: str,
        rngs: nnx.Rngs | None,
    ) -> None:
        widths = () if isinstance(outer, int) or len(outer) == 1 else tuple(outer)
        columns = outer if isinstance(outer, int) else sum(outer)
        self.kernel = declare(Weight((inner, columns), axes, "matrix", Normal(std), widths), rngs)
        self.bias = declare(Weight((columns,), axes[1:], "bias", Constant(0.0)), rngs) if bias else None
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

    def __init__(self, width: int, config: ModelConfig, rngs: nnx.Rngs | None = None) -> None:
        centred = config.norm == "layernorm"
        weight = Weight((width,), ("embed",), "norm", Constant(1.0))
        self.weight = declare(weight, rngs) if config.norm_affine else None
        biased = config.norm_affine and config.norm_bias and centred
        self.bias = declare(replace(weight, role="bias", init=Constant(0.0)), rngs) if biased else None
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


class Attention(nnx.Module):
    """Self-attention with grouped-query heads and a fused query-key-value projection."""

    def __init__(
        self, config: ModelConfig, layer: LayerConfig, sizes: Sizes, *, dtype: str, rngs: nnx.Rngs | None
    ) -> None:
        inner = sizes.heads * sizes.head_dim
        bias = config.bias or config.qkv_bias
        std, options = sizes.std(config.width), {"dtype": dtype, "rngs": rngs}
        self.qkv = Dense(config.width, sizes.qkv, ("embed", "heads"), std=std, bias=bias, **options)
        std = sizes.output_std(inner)
        self.out = Dense(inner, config.width, ("heads", "embed"), std=std, bias=config.bias, **options)
        self.query_norm = HeadNorm(sizes.head_dim, rngs) if config.qk_norm_weight else None
        self.key_norm = HeadNorm(sizes.head_dim, rngs) if config.qk_norm_weight else None
        gate = Weight((), (), "scalar", Constant(1.0))
        self.value_gate = declare(gate, rngs) if config.value_embeddings else None
        self.sizes, self.eps = sizes, config.norm_eps if config.qk_norm else None
        self.window, self.softcap = layer.window, config.attention_softcap
        rotary = rotary_of(layer)
        self.rotary = None if rotary is None else rotaries_of(config).index(rotary)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        context: Context,
        value: Float[Array, "batch seq kv"] | None,
        cache: tuple[Cache, int | Array] | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache | None]:
        """Attend within `x`, or within a cache that holds `x` from then on.

        Args:
            x: normalised input (batch, seq, embed).
            context: masks, rotary angles and positions.
            value: value embeddings of this layer, or None.
            cache: of this block, stacked over repeats, and which of them this is.

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
        if context.shared and self.window is not None:
            raise ConfigError(NO_VIRTUAL_TOKENS)
        prefix = prefix_of(self.qkv.kernel[...], sizes.kv_heads, batch, k.dtype)
        options = {"window": self.window, "scale": sizes.attention_scale, "softcap": self.softcap}
        held = None
        if cache is not None and context.places is not None:
            own, repeat = cache
            if context.shared:
                options |= {"shared": context.shared, "prefix": prefix}
            mixed, held = own.attend(repeat, q, k, v, context.places, **options)
        elif context.texts is not None:
            mixed = context.texts.attend(q, k, v, causal=context.causal, segment_ids=context.segment_ids, **options)
        else:
            hidden = {"segment_ids": context.segment_ids, "kv_mask": context.kv_mask, "shared": context.shared}
            if prefix is not None:
                k, v, hidden = after_prefix(k, v, prefix, hidden)
            mixed = attention(q, k, v, causal=context.causal, **hidden, **options)
        return checkpoint_name(self.out(mixed.reshape(batch, length, -1)), "attention_out"), held


class HeadNorm(nnx.Module):
    """The weight of a norm of heads, applied by their kernel."""

    def __init__(self, head_dim: int, rngs: nnx.Rngs | None) -> None:
        self.weight = declare(Weight((head_dim,), ("head_dim",), "norm", Constant(1.0)), rngs)


class FeedForward(nnx.Module):
    """Two projections around a non-linearity, gated or not."""

    def __init__(self, config: ModelConfig, sizes: Sizes, width: int, *, dtype: str, rngs: nnx.Rngs | None) -> None:
        std, options = sizes.std(config.width), {"bias": config.bias, "dtype": dtype, "rngs": rngs}
        self.up = Dense(config.width, sizes.up_of(width), ("embed", "mlp"), std=std, **options)
        self.down = Dense(width, config.width, ("mlp", "embed"), std=sizes.output_std(width), **options)
        self.activation: Activation = config.activation

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        """Transform each token by itself."""
        h = checkpoint_name(self.up(x), "up")
        return checkpoint_name(self.down(activate(self.activation, h)), "down")


class Skip(nnx.Module):
    """Learned mixture of the residual stream and the embedding; it starts as the stream alone."""

    def __init__(self, rngs: nnx.Rngs | None) -> None:
        self.stream = declare(Weight((), (), "scalar", Constant(1.0)), rngs)
        self.embedding = declare(Weight((), (), "scalar", Constant(0.0)), rngs)

    def __call__(
        self, x: Float[Array, "batch seq embed"], embedding: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        """Mix the stream with the embedding."""
        return self.stream[...].astype(x.dtype) * x + self.embedding[...].astype(x.dtype) * embedding


class HeadTransform(nnx.Module):
    """BERT's dense + GELU + LayerNorm before the decoder."""

    def __init__(self, config: ModelConfig, sizes: Sizes, *, dtype: str, rngs: nnx.Rngs | None) -> None:
        width = config.width
        bias = config.head_transform_bias
        self.dense = Dense(width, width, ("embed", "embed"), std=sizes.std(width), bias=bias, dtype=dtype, rngs=rngs)
        self.norm = Norm(width, config, rngs)

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Transform what the decoder will read."""
        return self.norm(jax.nn.gelu(self.dense(x), approximate=False))


class Decoder(nnx.Module):
    """The untied matrix to the vocabulary, and its bias; the cross entropy kernel applies them."""

    def __init__(self, config: ModelConfig, sizes: Sizes, *, rngs: nnx.Rngs | None) -> None:
        columns = "classes" if sizes.tails else "vocab"
        kernel = Weight((config.width, sizes.decoder), ("embed", columns), "head", Normal(sizes.outer_std))
        self.kernel = None if config.tied else declare(kernel, rngs)
        bias = Weight((sizes.vocab,), ("vocab",), "bias", Constant(0.0))
        self.bias = declare(bias, rngs) if config.head_bias else None


class TailHead(nnx.Module):
    """A tail of an adaptive softmax: down to a narrower width, then to its own tokens."""

    def __init__(self, config: ModelConfig, sizes: Sizes, index: int, *, rngs: nnx.Rngs | None) -> None:
        narrow, tokens = sizes.tails[index]
        std = Normal(sizes.std(config.width)), Normal(sizes.std(narrow))
        self.down = Kernel(Weight((config.width, narrow), ("embed", "mlp"), "matrix", std[0]), rngs)
        self.decoder = Kernel(Weight((narrow, tokens), ("mlp", "classes"), "head", std[1]), rngs)


class Kernel(nnx.Module):
    """A bare matrix, applied elsewhere."""

    def __init__(self, weight: Weight, rngs: nnx.Rngs | None) -> None:
        self.kernel = declare(weight, rngs)


class Classifier(nnx.Module):
    """Labels of texts from one token of each: dense, tanh, dropout, linear (Devlin et al. 2019, code)."""

    def __init__(self, config: ModelConfig, sizes: Sizes, *, rngs: nnx.Rngs | None) -> None:
        made = config.classifier
        assert made is not None, "a head for labels"
        inner, width = config.width, made.width or config.width
        self.dense = _Label(inner, width, "embed", sizes.std(inner), rngs)
        self.linear = _Label(width, made.outputs, "rank", sizes.std(width), rngs)
        self.dropout = made.dropout

    def __call__(self, x: Float[Array, "batch embed"], rng: Any) -> Float[Array, "batch outputs"]:
        """Numbers for each text, in float32; without a key, no dropout."""
        return self.linear(dropout(jnp.tanh(self.dense(x.astype(jnp.float32))), self.dropout, rng))


class _Label(nnx.Module):
    """A linear layer of the classifier, in float32 throughout: it is small, and trained beside adapters too."""

    def __init__(self, inner: int, outer: int, axis: str, std: float, rngs: nnx.Rngs | None) -> None:
        self.kernel = declare(Weight((inner, outer), (axis, "rank"), "head", Normal(std), always_trained=True), rngs)
        self.bias = declare(Weight((outer,), ("rank",), "bias", Constant(0.0), always_trained=True), rngs)

    def __call__(self, x: Float[Array, "batch inner"]) -> Float[Array, "batch outer"]:
        """Multiply, and add the bias."""
        kernel, bias = (part[...].astype(jnp.float32) for part in (self.kernel, self.bias))
        return jnp.dot(x, kernel, precision="highest") + bias


class Head(nnx.Module):
    """The residual stream to what the decoder, or a classifier, reads."""

    def __init__(self, config: ModelConfig, sizes: Sizes, *, dtype: str, rngs: nnx.Rngs | None) -> None:
        self.norm = Norm(config.width, config, rngs) if config.final_norm else None
        transforms = config.head_transform and config.classifier is None
        self.transform = HeadTransform(config, sizes, dtype=dtype, rngs=rngs) if transforms else None
        self.width_ratio = 1.0 if config.classifier is not None else sizes.width_ratio
        if config.classifier is not None:  # and nothing for tokens
            self.classifier = Classifier(config, sizes, rngs=rngs)
            return
        self.decoder = Decoder(config, sizes, rngs=rngs)
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


def dropout(x: Float[Array, "*shape"], rate: float, rng: Any) -> Float[Array, "*shape"]:
    """Zero entries with probability `rate` and scale the others up; without a key, nothing."""
    if rng is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
