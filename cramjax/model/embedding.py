"""The start of a model: tokens to the residual stream, and the virtual tokens before them.

As `cramjax.model.layers`, which has the other parts.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cramjax.config import ModelConfig
from cramjax.kernels.lookup import lookup
from cramjax.kernels.packed import prompt_of
from cramjax.model.layers import Norm, declare
from cramjax.model.positions import bigram_buckets, sinusoids
from cramjax.model.sizes import Sizes
from cramjax.model.weights import Constant, Normal, Weight


class Table(nnx.Module):
    """Rows looked up by number."""

    def __init__(self, *shape: int, axes: tuple[str, ...], std: float, rngs: nnx.Rngs | None) -> None:
        self.table = declare(Weight(shape, axes, "embedding", Normal(std)), rngs)

    def __call__(self, rows: Int[Array, "batch seq"]) -> Float[Array, "*stack batch seq embed"]:
        """Look up rows; a number past the end reads the last one."""
        return lookup(self.table[...], rows)

    def within(self, rows: Int[Array, "rows seq"]) -> Float[Array, "rows seq embed"]:
        """Look up rows; a number past the end gives NaN."""
        return nan_past(self(rows), rows, self.table[...].shape[0])


class SinusoidalPositions(nnx.Module):
    """Fixed sinusoids times one learned scalar that starts at width^-½ (Geiping & Goldstein 2022; µP: base width)."""

    def __init__(self, rows: int, width: int, base_width: int, rngs: nnx.Rngs | None) -> None:
        self.scale = declare(Weight((), (), "scalar", Constant(base_width**-0.5)), rngs)
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

    def __init__(self, config: ModelConfig, sizes: Sizes, *, dtype: str, rngs: nnx.Rngs | None) -> None:
        std = sizes.outer_std
        tokens, places = ("vocab", "embed"), ("seq", "embed")
        self.token = Table(sizes.vocab, config.width, axes=tokens, std=std, rngs=rngs)
        # Flax wants each attribute assigned once.
        match config.positions:
            case "learned":
                self.position = Table(sizes.positions, config.width, axes=places, std=std, rngs=rngs)
            case "sinusoidal":
                base_width = config.mup_base_width or config.width
                self.position = SinusoidalPositions(sizes.positions, config.width, base_width, rngs)
            case _:
                self.position = None
        types, buckets = config.token_types, config.bigram_buckets
        self.token_type = Table(types, config.width, axes=places, std=std, rngs=rngs) if types else None
        self.bigram = Table(buckets, config.width, axes=("buckets", "embed"), std=0.0, rngs=rngs) if buckets else None
        values, of_values = (sizes.value_layers, sizes.vocab, sizes.qkv[2]), ("layer", "vocab", "heads")
        self.value = Table(*values, axes=of_values, std=std, rngs=rngs) if config.value_embeddings else None
        self.norm = Norm(config.width, config, rngs) if config.embedding_norm else None
        self.buckets, self.scale, self.dtype = config.bigram_buckets, config.embedding_scale, dtype

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "rows seq"],
        previous: Int[Array, " batch"] | None,
        rows: Float[Array, "batch seq embed"] | None = None,
        token_types: Int[Array, "batch seq"] | None = None,
        shift: int = 0,
    ) -> Float[Array, "batch seq embed"]:
        """Embed tokens at positions; `previous` is the token before each row, for bigrams (None: there is none),
        `rows` those of the token table, where they have been looked up, `token_types` rows of the table of types
        (None: 0), and `shift` the virtual tokens before position 0.
        """
        x = self._placed(self.token(tokens) if rows is None else rows, positions + shift, token_types)
        if self.bigram is not None:
            x = x + self.bigram(bigram_buckets(tokens, previous, self.buckets, positions))
        return self._finished(x)

    def prompt(self) -> Float[Array, "1 virtual embed"] | None:
        """The virtual tokens before every text, embedded at the positions before it; None if there are none."""
        rows = prompt_of(self.token.table[...])
        return None if rows is None else self._finished(self._placed(rows[None], jnp.arange(len(rows))[None], None))

    def _placed(self, x: Array, positions: Array, token_types: Array | None) -> Array:
        x = x if self.scale == 1 else self.scale * x
        if self.position is not None:
            x = x + self.position.within(positions)
        if self.token_type is not None:
            x = x + (self.token_type.table[...][0] if token_types is None else self.token_type(token_types))
        return x

    def _finished(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        return x if self.norm is None else self.norm(x)

    def values(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "value_layers batch seq kv"] | None:
        """Value embeddings of the tokens for every layer that has them."""
        if self.value is None:
            return None
        return self.value(tokens).astype(self.dtype)


def nan_past(
    x: Float[Array, "rows seq embed"], positions: Int[Array, "rows seq"], length: int
) -> Float[Array, "rows seq embed"]:
    """NaN in the place of tokens whose positions are not below `length`: what is not there is not guessed."""
    return jnp.where((positions < length)[..., None], x, jnp.nan)
