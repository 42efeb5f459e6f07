"""The block: attention, and a feed-forward layer or experts, around the residual stream."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from cramjax.config import LayerConfig, ModelConfig
from cramjax.model.cache import Cache
from cramjax.model.experts import Experts
from cramjax.model.layers import Attention, Context, FeedForward, Norm, Skip, added, dropout
from cramjax.model.remat import BLOCK_INPUT
from cramjax.model.sizes import Sizes


class Block(nnx.Module):
    """Attention and feed-forward around the residual stream: the unit of everything."""

    def __init__(
        self, config: ModelConfig, layer: LayerConfig, sizes: Sizes, *, dtype: str, rngs: nnx.Rngs | None
    ) -> None:
        self.skip = Skip(rngs) if config.embedding_skip else None
        self.attention_norm = Norm(config.width, config, rngs) if layer.attention_norm else None
        self.attention = Attention(config, layer, sizes, dtype=dtype, rngs=rngs)
        self.mlp_norm = Norm(config.width, config, rngs)
        made = {"dtype": dtype, "rngs": rngs}
        self.mlp = None if layer.experts else FeedForward(config, sizes, config.mlp, **made)
        self.experts = Experts(config, sizes, **made) if layer.experts else None
        sandwich = config.norm_position == "sandwich"
        self.attention_out_norm = Norm(config.width, config, rngs) if sandwich else None
        self.mlp_out_norm = Norm(config.width, config, rngs) if sandwich else None
        self.pre, self.dropout = config.norm_position != "post", config.dropout

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        context: Context,
        value: Float[Array, "batch seq kv"] | None,
        cache: tuple[Cache, int | Array] | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache | None]:
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
            changed = self._transformed(read, context)
            changed = changed if self.mlp_out_norm is None else self.mlp_out_norm(changed)
        x = added(x, dropout(changed, self.dropout, second))
        return (x if self.pre else self.mlp_norm(x)), written

    def _transformed(self, x: Float[Array, "batch seq embed"], context: Context) -> Float[Array, "batch seq embed"]:
        """Each token by itself, by the one layer or by its experts."""
        if self.experts is not None:
            return self.experts(x, context)
        assert self.mlp is not None, "a block has either"
        return self.mlp(x)
