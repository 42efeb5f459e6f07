"""What the device runs for a batch: a block in two parts, between which its attention may be elsewhere, and both ends.

The parts are those of `Stack.one_block`, seen through caches (`cramjax.model.cache`) that stand for what happens
between them: one that keeps what attention is asked, and one that knows the answer. What nobody reads of a trace, the
compiler leaves out.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cramjax.kernels.attention import attention
from cramjax.kernels.packed import Streamed, is_packed, streams
from cramjax.model import Model
from cramjax.model.cache import Cache, Contiguous, Places
from cramjax.model.decode import TextCache, begin, grown
from cramjax.serve.offload.encoding import Encoding

Rows = tuple[slice, slice, slice]
"""Rows of a batch on each tier."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Fresh(Cache):
    """Where nothing came before: new tokens attend to each other, and are kept."""

    def attend(self, repeat: Any, q: Array, k: Array, v: Array, places: Places, **options: Any) -> tuple[Array, Cache]:
        del repeat
        return attention(q, k, v, causal=True, segment_ids=places.segment_ids, **options), _Fresh(k, v)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Asked(Cache):
    """Keeps what attention is asked; the answer is nobody's."""

    query: Any = None

    def attend(self, repeat: Any, q: Array, k: Array, v: Array, places: Places, **options: Any) -> tuple[Array, Cache]:
        del repeat, places, options
        return jnp.zeros_like(q), _Asked(k, v, q)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Known(Cache):
    """Gives an answer that was found elsewhere."""

    answer: Any = None

    def attend(self, repeat: Any, q: Array, k: Array, v: Array, places: Places, **options: Any) -> tuple[Array, Cache]:
        del repeat, q, k, v, places, options
        return self.answer, self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Complete(Contiguous):
    """Holds the new tokens already."""

    def _written(self, at: tuple[Any, ...], k: Array, v: Array) -> Cache:
        del at, k, v
        return self


@dataclass(frozen=True)
class Programs:
    """The programs of batches of some rows; each is compiled when it is first called."""

    model: Model
    encoding: Encoding
    cached: Rows
    """Rows of which each tier holds keys and values."""
    by_kernel: bool
    """Whether a few rows are multiplied with weights by the kernel for them."""
    _compiled: dict[Any, Any] = field(default_factory=dict, compare=False)
    _seconds: list[float] = field(default_factory=list, compare=False)

    @property
    def compiling_seconds(self) -> float:
        """That the programs took to compile so far."""
        return sum(self._seconds)

    def call(self, name: str, *args: Any, place: int = 0, host: Any = None) -> Any:
        """Run a program.

        Args:
            name: of the method that it is.
            args: its arguments.
            place: of the block in its period; of some programs a block's own.
            host: the device that runs it, where it is not the default one.
        """
        key = name, place
        if key not in self._compiled:
            function: Callable[..., Any] = functools.partial(getattr(self, name), place)
            self._compiled[key] = jax.jit(function, donate_argnums=_DONATED.get(name, ()))
        compiled, began = self._compiled[key], time.perf_counter()
        known = compiled._cache_size()
        with contextlib.nullcontext() if host is None else jax.default_device(host):
            result = compiled(*args)
        if compiled._cache_size() > known:
            self._seconds.append(time.perf_counter() - began)
        return result

    def embed(
        self, place: int, params: PyTree, rows: Array, text: TextCache, tokens: Array, counts: Array
    ) -> tuple[Array, Any, TextCache]:
        """The residual stream of new tokens, what blocks read beside it, and the text that has grown by them."""
        del place
        # What stands where the table would is not read.
        whole = {"embed": params.get("embed", {}) | {"token": {"table": jnp.zeros((1, 1))}}}
        x, begun = begin(self.model, whole, text, tokens, counts, rows)
        return x, begun.context, grown(text, begun, ())

    def prompt(self, place: int, params: PyTree, x: Array, context: Any, repeat: Array) -> tuple[Array, list[PyTree]]:
        """A block over prompts, and what each tier is to hold of their keys and values."""
        out, held = self._block(place, params, x, context, repeat, _Fresh(None, None))
        return out, self._divided(held)

    def project(
        self, place: int, params: PyTree, x: Array, context: Any, repeat: Array
    ) -> tuple[list[Array], list[PyTree], list[Places]]:
        """A block up to its attention: queries, new keys and values, and where they stand, for each tier's rows."""
        _, asked = self._block(place, params, x, context, repeat, _Asked(None, None))
        queries = [asked.query[rows] for rows in self.cached]  # pyright: ignore[reportAttributeAccessIssue]
        places = [jax.tree.map(lambda part, own=rows: part[own], context.places) for rows in self.cached]
        return queries, self._divided(asked), places

    def rest(
        self, place: int, params: PyTree, x: Array, context: Any, repeat: Array, mixed: list[Array]
    ) -> Float[Array, "batch seq embed"]:
        """A block from its attention on."""
        answer = jnp.concatenate(mixed)
        return self._block(place, params, x, context, repeat, _Known(None, None, answer))[0]

    def attend(self, place: int, held: PyTree, query: Array, places: Places) -> Array:
        """Attention of one token of each row to keys and values that hold the new ones already."""
        layer, model = self.model.period[place], self.model
        keys, values = (self.encoding.decode(held[name])[None] for name in ("keys", "values"))
        options = {"scale": model.sizes.attention_scale, "softcap": model.config.attention_softcap}
        at = jnp.arange(len(query))[:, None], jnp.minimum(places.positions, keys.shape[2] - 1)
        new = keys[0][at], values[0][at]  # the kernel writes them, once more
        return _Complete(keys, values).attend(0, query, *new, places, window=layer.window, **options)[0]

    def append(self, place: int, held: PyTree, query: Array, new: PyTree, places: Places) -> tuple[Array, PyTree]:
        """The same where they do not: they are written first, in place."""
        at = jnp.arange(len(query))[:, None]

        def written(part: Array, own: Array) -> Array:
            where = jnp.where(places.real, places.positions, part.shape[1])
            return part.at[at, where].set(own, mode="drop")

        held = jax.tree.map(written, held, new)
        return self.attend(place, held, query, places), held

    def fill(self, place: int, held: PyTree, new: PyTree) -> PyTree:
        """Keys and values with those of prompts at their beginning, in place."""
        del place
        return jax.tree.map(lambda part, own: jax.lax.dynamic_update_slice(part, own, (0,) * part.ndim), held, new)

    def head(self, place: int, params: PyTree, x: Array, counts: Array) -> Float[Array, "batch vocab"]:
        """Logits after each row's last token."""
        del place
        last = x[jnp.arange(len(x)), jnp.maximum(counts - 1, 0)]
        whole = {"head": params.get("head", {}), "embed": params.get("embed", {"token": {"table": None}})}
        whole = self._streamed(whole, dict(self.model.weights))
        return self.model.logits(whole, self.model.head(whole, last))

    def _block(
        self, place: int, params: PyTree, x: Array, context: Any, repeat: Array, cache: Cache
    ) -> tuple[Array, Any]:
        weights = self.model.weights["blocks"]
        params = self._streamed(params, weights if len(self.model.period) == 1 else weights[str(place)])
        return self.model.one_block(params, x, context, repeat, place, cache)

    def _divided(self, cache: Any) -> list[PyTree]:
        encoded = {"keys": self.encoding.encode(cache.keys), "values": self.encoding.encode(cache.values)}
        return [jax.tree.map(lambda part, own=rows: part[own], encoded) for rows in self.cached]

    def _streamed(self, params: PyTree, weights: PyTree) -> PyTree:
        if not self.by_kernel:
            return params

        def own(path: Any, leaf: Any) -> Any:
            place = weights
            for key in path:
                place = place[key.key]
            if place.role == "matrix" or (place.role == "head" and not self.model.sizes.tails):
                return Streamed(leaf) if streams(leaf) else leaf
            return leaf

        return jax.tree_util.tree_map_with_path(own, params, is_leaf=is_packed)


_DONATED = {"append": (0,), "fill": (0,)}


def empty_text(model: Model, rows: int, length: int) -> TextCache:
    """The text of rows that have none yet, as `Programs.embed` keeps it.

    Args:
        model: the model.
        rows: of a batch.
        length: most tokens of a row.
    """
    none = jnp.zeros(rows, jnp.int32)
    return TextCache((), jnp.zeros((rows, length), jnp.int32), none, none - 1, none)


def computing(model: Model, on_cpu: bool, by_kernel: bool) -> Model:
    """The model as it computes here: on CPUs activations are float32, as where it is decoded from memory."""
    if not on_cpu:
        return model
    return replace(model, compute_dtype="float32", cached_by_kernel=by_kernel)
