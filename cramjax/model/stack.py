"""A model is a stack: embed, blocks, head, as pure functions over nested dicts of arrays.

The blocks' parameters are stacked on a leading axis, of the repeats of their period (`cramjax.model.pattern`). Walks
over the stack are files of their own: `walk`, `decode`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from cramjax.adapters import AdapterConfig
from cramjax.config import LayerConfig, ModelConfig, Remat
from cramjax.errors import ConfigError
from cramjax.kernels.packed import Prefixed, is_packed, prompt_of
from cramjax.model.adapters import adapted_params, adapted_weights
from cramjax.model.block import Block
from cramjax.model.cache import Cache
from cramjax.model.embedding import Embedding
from cramjax.model.layers import Context, Head, declared, dropout
from cramjax.model.pattern import period_of, repeats_of, rotaries_of
from cramjax.model.positions import rotary_angles
from cramjax.model.ragged import Ragged
from cramjax.model.sizes import Sizes, sizes_of

# Above this many layers, compiling an unrolled stack costs more than it saves.
_UNROLLED_LAYERS = 8
# With kernels for GPUs it saves more: a scan copies what a layer keeps, and gradients, in and out of stacks. Without
# them XLA keeps float32 copies of what weights' gradients read, of all layers at once.
_UNROLLED_LAYERS_OF_KERNELS = 32


def unrolls(layer_loop: Literal["auto", "scan", "unroll"], layers: int, remat: Remat, *, kernels: bool) -> bool:
    """Whether a stack is walked unrolled.

    Args:
        layer_loop: as configured. `auto` scans where anything is recomputed: XLA's CPU backend computes it too early in
            an unrolled stack, and saves nothing.
        layers: of the stack.
        remat: what is recomputed.
        kernels: whether the device that runs it has row kernels (`cramjax.kernels.rows`).
    """
    most = _UNROLLED_LAYERS_OF_KERNELS if kernels else _UNROLLED_LAYERS
    return layer_loop == "unroll" or (layer_loop == "auto" and layers <= most and remat == "none")


@dataclass(frozen=True)
class Stack:
    """The parts of a configured model: functions of parameters and arrays, with no state of its own."""

    config: ModelConfig
    vocab_size: int
    sequence_length: int
    causal: bool
    separator_id: int | None
    compute_dtype: str
    unroll: bool
    remat: Remat
    param_dtype: str = "float32"
    adapter: AdapterConfig | None = None
    cached_by_kernel: bool = False
    """Whether a few new tokens may go through all blocks by `cramjax.model.in_one_call`, or, where they cannot, single
    ones attend to a cache by `cramjax.kernels.attention.pages`."""

    @property
    def sizes(self) -> Sizes:
        """Shapes of the parameters."""
        return sizes_of(self.config, self.vocab_size, self.sequence_length)

    @cached_property
    def period(self) -> tuple[LayerConfig, ...]:
        """The blocks that the stack repeats."""
        return period_of(self.config)

    @property
    def repeats(self) -> int:
        """Steps of a walk: how often the stack repeats its period. To a walk, one step is one block."""
        return self.config.layers // len(self.period)

    def init(self, key: Array) -> PyTree:
        """New parameters: `{"embed": …, "blocks": … (leading axis of repeats), "head": …}`.

        Args:
            key: a random key.
        """
        embed_key, block_key, head_key = jax.random.split(key, 3)
        params = {
            "embed": self._initial(self._embedding, embed_key),
            "blocks": jax.vmap(self._initial_blocks)(self._block_keys(block_key)),
            "head": self._initial(self._head, head_key),
        }
        return self.adapted(params, key)

    def adapted(self, params: PyTree, key: Array) -> PyTree:
        """Parameters of the model without its adapter, with it as it starts; the same, where there is none.

        Args:
            params: arrays.
            key: a random key.
        """
        if self.adapter is None:
            return params
        return adapted_params(params, self.weights, self.adapter, key, self.vocab_size)

    @property
    def typed(self) -> bool:
        """Whether its embedding tells two texts apart (BERT)."""
        return self.config.token_types > 1

    @property
    def bare(self) -> "Stack":
        """The same without an adapter."""
        return replace(self, adapter=None)

    def init_block(self, key: Array, repeat: Int[Array, ""]) -> PyTree:
        """One step's blocks of `init`, drawn alone.

        Args:
            key: that of `init`.
            repeat: which step of a walk; may be traced.
        """
        return self._initial_blocks(self._block_keys(jax.random.split(key, 3)[1])[repeat])

    def _block_keys(self, key: Array) -> Array:
        """Random keys of all blocks (repeats, blocks of a period)."""
        return jax.random.split(key, self.config.layers).reshape(self.repeats, len(self.period))

    def _initial_blocks(self, keys: Array) -> PyTree:
        places = range(len(self.period))
        return by_place([self._initial(partial(self._block, place), keys[place]) for place in places])

    @property
    def weights(self) -> PyTree:
        """The declarations of the parameters: a tree of `Weight`s in their structure."""
        own = weights_of(self.config, self.vocab_size, self.sequence_length)
        return own if self.adapter is None else adapted_weights(own, self.adapter)

    def abstract_params(self) -> PyTree:
        """Shapes and types of the parameters."""
        own = weights_of(self.config, self.vocab_size, self.sequence_length)
        params = jax.tree.map(lambda weight: jax.ShapeDtypeStruct(weight.stacked_shape, self.param_dtype), own)
        return jax.eval_shape(self.adapted, params, jax.random.key(0))

    def embed(
        self,
        params: PyTree,
        tokens: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "rows seq"] | None = None,
        previous: Int[Array, " batch"] | None = None,
        kv_mask: Bool[Array, "batch seq"] | None = None,
        rng: Array | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        rows: Float[Array, "batch seq embed"] | None = None,
        token_types: Int[Array, "batch seq"] | None = None,
        texts: Ragged | None = None,
    ) -> tuple[Float[Array, "batch stream embed"], Context]:
        """The start of the walk: the residual stream, and what the blocks read beside it.

        Where the parameters have a prompt, it comes before the tokens of every row, and the stream is so much longer.

        Args:
            params: all parameters.
            tokens: token ids (batch, seq).
            positions: of the tokens. Default: 0, 1, …; one past the model's table of positions gives NaN. The token at
                position 0 has none before it.
            previous: the token before each row, -1 for none.
            kv_mask: False at padding.
            rng: key for dropout; None: none.
            segment_ids: document of each token, when attention is per document. Default: found from the separators.
            rows: the token table's rows of the tokens. Default: looked up.
            token_types: row of the table of types for each token. Default: 0.
            texts: where texts lie in the one row that the tokens are; see `cramjax.model.unpadded`.

        Raises:
            ConfigError: more tokens than the model has positions.
        """
        prompt, shift = prompt_of(params["embed"]["token"]["table"]), virtual_tokens(params)
        if positions is None:
            self.check_length(tokens.shape[1] + shift, "a sequence")
        embedding = self._merge("embed", params["embed"])
        where = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        embed_rng, block_rng = (None, None) if rng is None else jax.random.split(rng)
        x, values = embedding(tokens, where, previous, rows, token_types, shift), embedding.values(tokens)
        if self.config.mask_documents and segment_ids is None:
            segment_ids = self.segment_ids(tokens)
        where = where + shift
        if prompt is not None:
            batch, own = len(tokens), embedding.prompt()
            before = jnp.broadcast_to(jnp.arange(shift), (len(where), shift))
            x = jnp.concatenate([jnp.broadcast_to(own, (batch, *own.shape[1:])), x], axis=1)
            where = jnp.concatenate([before, where], axis=1)
            values, segment_ids, kv_mask = (
                None if each is None else jnp.pad(each, _front(each, shift, axis), constant_values=filling)
                for each, axis, filling in ((values, 2, 0), (segment_ids, 1, 0), (kv_mask, 1, True))
            )
        x = dropout(x, self.config.dropout, embed_rng)
        context = Context(
            embedding=x if self.config.embedding_skip else None,
            values=values,
            rotary=self._rotary(where),
            segment_ids=segment_ids,
            kv_mask=kv_mask,
            texts=texts,
            rng=block_rng,
            causal=self.causal,
            shared=shift,
        )
        return x, context

    def prompt(self, params: PyTree, batch: int) -> tuple[Float[Array, "batch virtual embed"], Context]:
        """The start of a walk over the virtual tokens of a prompt alone, as `embed` is of all.

        Args:
            params: all parameters, with a prompt.
            batch: rows.
        """
        embedding = self._merge("embed", params["embed"])
        own = embedding.prompt()
        x = jnp.broadcast_to(own, (batch, *own.shape[1:]))
        values = embedding.values(jnp.zeros(x.shape[:2], jnp.int32))
        context = Context(
            embedding=x if self.config.embedding_skip else None,
            values=None if values is None else jnp.zeros_like(values),
            rotary=self._rotary(jnp.arange(x.shape[1])[None]),
            causal=self.causal,
            shared=x.shape[1],
        )
        return x, context

    def _rotary(self, where: Int[Array, "rows seq"]) -> tuple[Any, ...]:
        """Rotary angles of some positions, of each set that blocks read."""
        return tuple(
            rotary_angles(where, self.sizes.head_dim, base, self.config.rope_scaling if scaled else None)
            for base, scaled in rotaries_of(self.config)
        )

    def segment_ids(self, tokens: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
        """Number of the document each token belongs to; a separator opens the document after it."""
        # Without a separator token, -1 is no token: all is one document.
        separator = -1 if self.separator_id is None else self.separator_id
        return jnp.cumsum(tokens == separator, axis=1, dtype=jnp.int32)

    def block(
        self, params: PyTree, x: Float[Array, "batch seq embed"], context: Context, repeat: int | Array
    ) -> Float[Array, "batch seq embed"]:
        """One step of the walk: a block, or the blocks of a period in turn.

        Args:
            params: parameters of this step, without the axis of repeats.
            x: residual stream.
            context: from `embed`.
            repeat: which step this is (it may be traced).
        """
        return self._step(params, x, context, repeat, [None] * len(self.period))[0]

    def decode_block(
        self,
        params: PyTree,
        x: Float[Array, "batch seq embed"],
        context: Context,
        repeat: int | Array,
        caches: tuple[Cache, ...],
    ) -> tuple[Float[Array, "batch seq embed"], tuple[Cache, ...]]:
        """One step of the walk with caches: new tokens attend to those before them, and are held.

        Args:
            params: parameters of this step, without the axis of repeats. A walk needs those of no other step.
            x: residual stream of the new tokens.
            context: from `cramjax.model.decode.begin`.
            repeat: which step this is (it may be traced).
            caches: of each block of a period, stacked over the repeats.
        """
        return self._step(params, x, context, repeat, caches)  # pyright: ignore[reportReturnType]

    def head(self, params: PyTree, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """The end of the walk: what the decoder reads (normalised, transformed)."""
        return self._merge("head", params["head"])(x)

    def normed(self, params: PyTree, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """The end of the walk for who reads the stream itself: normalised, where the head begins with a norm."""
        norm = self._merge("head", params["head"]).norm
        return x if norm is None else norm(x)

    def classify(
        self, params: PyTree, x: Float[Array, "batch embed"], rng: Array | None
    ) -> Float[Array, "batch outputs"]:
        """The end of the walk of a model with a classifier: logits of classes, or numbers, float32.

        Args:
            params: all parameters.
            x: the stream's token that speaks for each text.
            rng: key for dropout; None: none.
        """
        head = self._merge("head", params["head"])
        return head.classifier(head(x), rng)

    def init_classifier(self, key: Array) -> PyTree:
        """New parameters of the classifier alone."""
        return self._initial(self._head, key)["classifier"]

    def check_length(self, length: int, of: str) -> None:
        """Refuse more tokens than there are positions.

        Raises:
            ConfigError: `length` tokens, in what `of` says, are too many.
        """
        rows = self.sizes.positions
        if self.config.positions in ("learned", "sinusoidal") and length > rows:
            raise ConfigError(
                f"The model has {rows} {self.config.positions} positions, so {of} can have at most {rows} tokens, got "
                f"{length}: give fewer."
            )

    def one_block(
        self,
        params: PyTree,
        x: Float[Array, "batch seq embed"],
        context: Context,
        repeat: int | Array,
        place: int,
        cache: Cache | None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache | None]:
        """One block alone, for walks that hold no more than that.

        Args:
            params: its parameters: of a step of the walk, those of one place of the period.
            x: residual stream.
            context: as of `block` or, with a cache, of `decode_block`.
            repeat: which step this is (it may be traced).
            place: of the block in the period.
            cache: its own, stacked over the repeats; None: none.
        """
        layer = repeat * len(self.period) + place
        own = context
        if context.rng is not None:
            own = replace(context, rng=jax.random.fold_in(context.rng, layer))
        block = nnx.merge(self._graphs[f"block{place}"], params)
        return block(x, own, self._value(context, layer), None if cache is None else (cache, repeat))

    def _step(
        self, params: PyTree, x: Array, context: Context, repeat: int | Array, caches: Sequence[Cache | None]
    ) -> tuple[Array, tuple[Cache | None, ...]]:
        held = []
        for place, cache in enumerate(caches):
            own = params if len(caches) == 1 else params[str(place)]
            x, new = self.one_block(own, x, context, repeat, place, cache)
            held.append(new)
        return x, tuple(held)

    def _value(self, context: Context, layer: int | Array) -> Array | None:
        """Value embeddings of a layer: every other one has them, counted from the last."""
        if context.values is None:
            return None
        has_value = (self.config.layers - 1 - layer) % 2 == 0
        if isinstance(layer, int):
            return context.values[layer // 2] if has_value else None
        return jnp.where(has_value, context.values[layer // 2], 0)

    def _embedding(self, rngs: nnx.Rngs | None) -> Embedding:
        return Embedding(self.config, self.sizes, dtype=self.compute_dtype, rngs=rngs)

    def _block(self, place: int, rngs: nnx.Rngs | None) -> Block:
        return Block(self.config, self.period[place], self.sizes, dtype=self.compute_dtype, rngs=rngs)

    def _head(self, rngs: nnx.Rngs | None) -> Head:
        return Head(self.config, self.sizes, dtype=self.compute_dtype, rngs=rngs)

    def _initial(self, make: Callable[[nnx.Rngs], nnx.Module], key: Array) -> PyTree:
        """Parameters of a part as they start. Those of low precision are rounded as they are drawn, layer by layer."""
        drawn = nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key))))
        return jax.tree.map(lambda p: p.astype(self.param_dtype), drawn)

    @cached_property
    def _graphs(self) -> dict[str, Any]:
        makers: dict[str, Callable[[None], nnx.Module]] = {"embed": self._embedding, "head": self._head}
        makers |= {f"block{place}": partial(self._block, place) for place in range(len(self.period))}
        return {name: nnx.graphdef(make(None)) for name, make in makers.items()}

    def _merge(self, part: Literal["embed", "head"], params: PyTree) -> Any:
        return nnx.merge(self._graphs[part], params)


@lru_cache(maxsize=64)
def weights_of(config: ModelConfig, vocab_size: int, sequence_length: int) -> PyTree:
    """The declarations of a model's parameters; arguments as of `make_model`. Nothing is traced or drawn."""
    sizes = sizes_of(config, vocab_size, sequence_length)
    period, repeats = period_of(config), repeats_of(config)
    kinds = {layer: declared(Block(config, layer, sizes, dtype="float32", rngs=None)) for layer in set(period)}
    stacked = [jax.tree.map(lambda weight: weight.stacked(repeats), kinds[layer]) for layer in period]
    return {
        "embed": declared(Embedding(config, sizes, dtype="float32", rngs=None)),
        "blocks": by_place(stacked),
        "head": declared(Head(config, sizes, dtype="float32", rngs=None)),
    }


def virtual_tokens(params: PyTree) -> int:
    """How many virtual tokens stand before every text: those of a prompt, or of a prefix.

    Args:
        params: all parameters.
    """
    prompt = prompt_of(params["embed"]["token"]["table"])
    if prompt is not None:
        return len(prompt)
    leaves = jax.tree.leaves(params.get("blocks"), is_leaf=is_packed)
    return next((leaf.count for leaf in leaves if isinstance(leaf, Prefixed)), 0)


def _front(array: Array, count: int, axis: int) -> list[tuple[int, int]]:
    """Padding of so many in front, along an axis."""
    return [(count if each == axis else 0, 0) for each in range(array.ndim)]


def by_place(each: list[PyTree]) -> PyTree:
    """What belongs to each block of a period, in the form that parameters have."""
    return each[0] if len(each) == 1 else {str(place): own for place, own in enumerate(each)}


def unstack(blocks: PyTree, repeats: int) -> list[PyTree]:
    """Parameters of each step of a walk.

    A split has one concatenation as its transpose, where indexing has a sum of paddings.
    """
    leaves, structure = jax.tree.flatten(blocks)
    parts = [[part[0] for part in jax.lax.split(leaf, (1,) * repeats, axis=0)] for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)]
