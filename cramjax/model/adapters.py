"""Adapters in a model: which of its matrices have one, what of them is declared, and how they start.

The declarations of an adapted model are a tree like its parameters': in the place of an adapted matrix stands the
packed leaf of its declaration and those of the adapter's parts.
"""

import fnmatch
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from cramjax.adapters import AdapterConfig
from cramjax.errors import ConfigError
from cramjax.kernels.packed import (
    LowRank,
    Prefixed,
    Prompted,
    Scaled,
    float8,
    is_adapter,
    is_packed,
    low_rank,
    microscaled,
    normal_float,
    quantise,
)
from cramjax.model.weights import Constant, Normal, Weight

_GROUP = 64
"""Weights of a column that share a scale, in bases of few bits."""


def adapted_weights(weights: PyTree, config: AdapterConfig) -> PyTree:
    """The declarations of a model with an adapter.

    Args:
        weights: those of the model without.
        config: which adapter.

    Raises:
        ConfigError: a pattern of targets matches no matrix.
    """
    names = [_name(path) for path, weight in _leaves(weights) if weight.role == "matrix"]
    for pattern in config.targets:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"adapter.targets: no matrix's path matches {pattern!r}. `*` stands for anything; the paths are "
                f"{', '.join(names)}."
            )
    taken = [path for path, weight in _leaves(weights) if "expert" in weight.axes and weight.role == "matrix"]
    hit = [name for name in map(_name, taken) if any(fnmatch.fnmatchcase(name, each) for each in config.targets)]
    if config.kind == "lora" and hit:
        raise ConfigError(
            f"adapter.targets takes in {hit[0]}, and the matrices of experts have no adapters: name others, such as "
            "blocks/*attention/*."
        )
    declare = {
        "lora": _low_rank,
        "ia3": _scaled,
        "bitfit": lambda name, weight, config: weight,
        "prompt": _prompted,
        "prefix": _prefixed,
    }[config.kind]
    return jax.tree_util.tree_map_with_path(lambda path, weight: declare(_name(path), weight, config), weights)


def adapted_params(params: PyTree, weights: PyTree, config: AdapterConfig, key: Array, vocab_size: int) -> PyTree:
    """The parameters of a model with an adapter as it starts: it changes nothing yet, but for virtual tokens.

    Args:
        params: of the model without one: arrays, or matrices that are held already as the configuration says.
        weights: declarations, from `adapted_weights`.
        config: which adapter, and how the model's own weights are held.
        key: random; each matrix's adapter is drawn from it and the matrix's number.
        vocab_size: tokens that a prompt may start as.
    """
    own = dict(jax.tree_util.tree_leaves_with_path(params, is_leaf=is_packed))
    found: list[Any] = []
    paths, structure = jax.tree_util.tree_flatten_with_path(weights, is_leaf=is_adapter)
    for number, (path, weight) in enumerate(paths):
        declared = weight.base if is_adapter(weight) else weight
        base = held(own[path], declared, config)
        if isinstance(weight, LowRank):
            drawn = jax.random.fold_in(key, number)
            options = {"scale": scale_of(config), "widths": weight.widths, "key": drawn, "dora": config.dora}
            base = low_rank(base, config.rank, **options)
        elif isinstance(weight, Scaled):
            ones = {name: _ones(getattr(weight, name)) for name in ("inputs", "outputs")}
            base = replace(weight, base=base, **ones)
        elif isinstance(weight, Prompted):
            base = Prompted(base, _first_rows(own[path], weight.rows, config, key, vocab_size))
        elif isinstance(weight, Prefixed):
            base = Prefixed(base, *(_drawn(each, key, salt) for salt, each in enumerate((weight.keys, weight.values))))
        found.append(base)
    return structure.unflatten(found)


def held(leaf: Any, weight: Weight, config: AdapterConfig) -> Any:
    """A weight of the model itself, as the configuration holds it.

    Args:
        leaf: the array; what is packed stays as it is.
        weight: its declaration.
        config: says how.
    """
    if is_packed(leaf):
        return leaf
    if weight.always_trained or config.base == "float32" or weight.role not in ("matrix", "embedding", "head"):
        return leaf.astype(jnp.float32)
    if config.base == "bfloat16" or weight.role != "matrix":
        return leaf.astype(jnp.bfloat16)
    group = math.gcd(_GROUP, leaf.shape[-2])
    make: dict[str, Callable[[], Any]] = {
        "int8": lambda: quantise(leaf, 8, group),
        "int4": lambda: quantise(leaf, 4, group),
        "nf4": lambda: normal_float(leaf, group),
        "fp8": lambda: float8(leaf, group),
        "mxfp4": lambda: microscaled(leaf),
    }
    return make[config.base]()


def as_base(leaf: Any, weight: Weight, config: AdapterConfig) -> Any:
    """A packed matrix in the parts that `held` gives, where it has such: but for its codes and the precision of its
    scales it is packed so. None: it is not.
    """
    wanted = jax.eval_shape(lambda w: held(w, weight, config), jax.ShapeDtypeStruct(leaf.shape, jnp.float32))
    if jax.tree.structure(leaf) != jax.tree.structure(wanted):
        return None
    pairs = list(zip(jax.tree.leaves(leaf), jax.tree.leaves(wanted), strict=True))
    widened = {(jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))}
    if any(p.shape != w.shape or not (p.dtype == w.dtype or (p.dtype, w.dtype) in widened) for p, w in pairs):
        return None
    return jax.tree.map(lambda part, like: part.astype(like.dtype), leaf, wanted)


def held_by_layer(array: np.ndarray, weight: Weight, config: AdapterConfig) -> Any:
    """A matrix of the model itself as `held`, of which no more than a layer is on the device as it was.

    Args:
        array: in host memory, stacked.
        weight: its declaration.
        config: says how it is held.
    """
    if weight.repeats is None:
        return held(jnp.asarray(array), weight, config)
    layers = [jax.block_until_ready(held(jnp.asarray(layer), weight, config)) for layer in array]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)


def scale_of(config: AdapterConfig) -> float:
    """What the product of an adapter's two matrices is multiplied with."""
    return config.alpha / (math.sqrt(config.rank) if config.rank_stabilised else config.rank)


def _low_rank(name: str, weight: Weight, config: AdapterConfig) -> Any:
    if weight.role != "matrix" or not any(fnmatch.fnmatchcase(name, pattern) for pattern in config.targets):
        return weight
    inner, outer = weight.shape
    parts = max(1, len(weight.widths))
    a = replace(weight, shape=(inner, parts * config.rank), axes=(weight.axes[0], "rank"))
    b = replace(
        weight, shape=(config.rank, outer), axes=("rank", weight.axes[1]), init=Constant(0.0), rate=config.b_ratio
    )
    length = replace(
        weight, shape=(1, outer), axes=("rank", weight.axes[1]), role="norm", init=Constant(1.0), widths=()
    )
    each = (config.rank,) * parts if weight.widths else ()
    return LowRank(
        base=weight,
        a=replace(a, widths=each),
        b=b,
        magnitude=length if config.dora else None,
        scale=scale_of(config),
        widths=weight.widths,
    )


def _scaled(name: str, weight: Weight, config: AdapterConfig) -> Any:
    del config
    vector = replace(weight, role="scalar", init=Constant(1.0), widths=())
    if name.endswith("attention/qkv/kernel"):
        start = weight.widths[0]
        outputs = replace(vector, shape=(1, weight.shape[1] - start), axes=("rank", weight.axes[1]))
        return Scaled(base=weight, inputs=None, outputs=outputs, start=start)
    if name.endswith("mlp/down/kernel"):
        inputs = replace(vector, shape=(weight.shape[0], 1), axes=(weight.axes[0], "rank"))
        return Scaled(base=weight, inputs=inputs, outputs=None, start=0)
    return weight


def _prompted(name: str, weight: Weight, config: AdapterConfig) -> Any:
    if name != "embed/token/table":
        return weight
    shape, axes = (config.virtual_tokens, weight.shape[1]), ("rank", weight.axes[1])
    return Prompted(base=weight, rows=replace(weight, shape=shape, axes=axes))


def _prefixed(name: str, weight: Weight, config: AdapterConfig) -> Any:
    if not name.endswith("attention/qkv/kernel"):
        return weight
    shape, axes = (config.virtual_tokens, weight.widths[-1]), ("rank", weight.axes[1])
    each = replace(weight, shape=shape, axes=axes, role="embedding", init=Normal(_PREFIX_STD), widths=())
    return Prefixed(base=weight, keys=each, values=each)


_PREFIX_STD = 0.02
"""Of a prefix's keys and values as they start."""


def _first_rows(table: Array, weight: Weight, config: AdapterConfig, key: Array, vocab_size: int) -> Array:
    """A prompt as it starts: rows of the vocabulary, or as random as these are."""
    table = table[:vocab_size].astype(jnp.float32)
    if config.prompt_start == "vocabulary":
        return table[jax.random.randint(key, weight.shape[:1], 0, vocab_size)]
    return jnp.std(table) * jax.random.normal(key, weight.shape)


def _drawn(weight: Weight, key: Array, salt: int) -> Array:
    std = weight.init.std if isinstance(weight.init, Normal) else 0.0
    return std * jax.random.normal(jax.random.fold_in(key, salt), weight.stacked_shape)


def _ones(weight: Weight | None) -> Array | None:
    return None if weight is None else jnp.ones(weight.stacked_shape, jnp.float32)


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
