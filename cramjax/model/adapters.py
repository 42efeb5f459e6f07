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
from jaxtyping import Array, PyTree

from cramjax.config import AdapterConfig
from cramjax.errors import ConfigError
from cramjax.kernels.packed import LowRank, Scaled, low_rank, normal_float, quantise
from cramjax.model.weights import Constant, Weight

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
    declare = {"lora": _low_rank, "ia3": _scaled, "bitfit": lambda name, weight, config: weight}[config.kind]
    return jax.tree_util.tree_map_with_path(lambda path, weight: declare(_name(path), weight, config), weights)


def adapted_params(params: PyTree, weights: PyTree, config: AdapterConfig, key: Array) -> PyTree:
    """The parameters of a model with an adapter that changes nothing yet.

    Args:
        params: of the model without one; arrays.
        weights: declarations, from `adapted_weights`.
        config: which adapter, and how the model's own weights are held.
        key: random; each matrix's adapter is drawn from it and the matrix's name.
    """
    own = dict(_leaves(params))
    found: list[Any] = []
    paths, structure = jax.tree_util.tree_flatten_with_path(weights, is_leaf=_is_adapter)
    for number, (path, weight) in enumerate(paths):
        declared = weight.base if _is_adapter(weight) else weight
        base = held(own[path], declared, config)
        if isinstance(weight, LowRank):
            drawn = jax.random.fold_in(key, number)
            options = {"scale": scale_of(config), "widths": weight.widths, "key": drawn, "dora": config.dora}
            base = low_rank(base, config.rank, **options)
        elif isinstance(weight, Scaled):
            ones = {name: _ones(getattr(weight, name)) for name in ("inputs", "outputs")}
            base = replace(weight, base=base, **ones)
        found.append(base)
    return structure.unflatten(found)


def held(leaf: Array, weight: Weight, config: AdapterConfig) -> Any:
    """A weight of the model itself, as the configuration holds it.

    Args:
        leaf: the array.
        weight: its declaration.
        config: says how.
    """
    if weight.always_trained or config.base == "float32" or weight.role not in ("matrix", "embedding", "head"):
        return leaf.astype(jnp.float32)
    if config.base == "bfloat16" or weight.role != "matrix":
        return leaf.astype(jnp.bfloat16)
    group = math.gcd(_GROUP, leaf.shape[-2])
    make: dict[str, Callable[[], Any]] = {
        "int8": lambda: quantise(leaf, 8, group),
        "int4": lambda: quantise(leaf, 4, group),
        "nf4": lambda: normal_float(leaf, group),
    }
    return make[config.base]()


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


def _ones(weight: Weight | None) -> Array | None:
    return None if weight is None else jnp.ones(weight.stacked_shape, jnp.float32)


def _is_adapter(leaf: Any) -> bool:
    return isinstance(leaf, LowRank | Scaled)


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
