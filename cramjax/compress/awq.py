"""Activation-aware scales: inputs that are large become small before weights are rounded, and their weights large.

Lin et al. 2023 (arXiv:2306.00978), section 3.2, and its code. A scale for each input of a matrix goes into its rows,
and its inverse into what computes that input: a norm's weight, the values of attention, or what a gate lets through.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from cramjax.compiling import jit
from cramjax.compress.walk import BlockWalk, Calibration
from cramjax.compress.watch import watched_block
from cramjax.config import ModelConfig
from cramjax.errors import ModelError
from cramjax.formats.table import flatten, unflatten
from cramjax.model import Stack
from cramjax.model.layers import Context

_POWERS = 20
_CLIPS, _CLIP_STEPS = 10, 20
_LEAST = 1e-4

Rounded = Callable[[Array], Array]
"""A matrix as it is after its rounding to nearest."""


@dataclass(frozen=True)
class _Fold:
    """Where the inputs of a matrix are computed."""

    reader: str
    """The matrix, by its name in the block."""
    norm: str | None = None
    """The norm whose results they are."""
    writer: tuple[str, slice, float] | None = None
    """Or the layer, its columns, and the power that its results enter with."""


def check_scaling(config: ModelConfig) -> None:
    """Refuse architectures whose inputs no weight scales.

    Raises:
        ModelError: it is one.
    """
    if not config.norm_affine:
        why = "its norms have none (model.norm_affine is false)"
    elif config.norm_position == "post":
        why = "its norms come after the sums that matrices read (model.norm_position is post)"
    elif config.experts is not None:
        why = "those of its experts' norms are their router's as well (model.experts)"
    else:
        return
    raise ModelError(f"awq puts the inverse of its scales into the weights of norms, and {why}: leave awq out.")


def scaled_block(
    walk: BlockWalk, block: PyTree, repeat: int, calibration: Calibration, rounded: Rounded
) -> tuple[PyTree, dict[str, np.ndarray]]:
    """A block that computes the same, with scales in its matrices that make rounding them cost less.

    The scale of an input is mean|x|^α, over the square root of the largest times the smallest; of α = 0, 1/20, … 19/20
    that is taken with which the outputs of the rounded matrix are nearest to its own (in the place of the outputs of
    all of attention, or of the feed-forward layer).

    Args:
        walk: which matrices are visited; others have no scales.
        block: its parameters.
        repeat: which step of the walk it is.
        calibration: before it.
        rounded: rounds a matrix.

    Returns:
        The block with matrices in float32, and those other parameters that changed, in their own precision.
    """
    leaves = {name: jnp.asarray(leaf) for name, leaf in flatten(block)}
    folds = [fold for fold in _folds(walk.stack) if _is_there(fold, leaves, walk.names)]
    known = _statistics(walk, block, repeat, calibration, tuple(fold.reader for fold in folds))
    changed: dict[str, np.ndarray] = {}
    for fold in folds:
        hessian, mean = known[fold.reader]
        scale = best_scale(leaves[fold.reader].astype(jnp.float32), hessian, mean, rounded)
        for name, leaf in _folded(fold, scale, leaves).items():
            leaves[name] = leaf
            if name not in walk.names:
                changed[name] = np.asarray(leaf)
    return unflatten(leaves, block), changed


def best_scale(
    w: Float[Array, "inner outer"], hessian: Float[Array, "inner inner"], mean: Float[Array, " inner"], rounded: Rounded
) -> Float[Array, " inner"]:
    """Scales of a matrix's inputs, as of `scaled_block`.

    Args:
        w: float32.
        hessian: mean of its inputs' outer products.
        mean: of their absolute values.
        rounded: rounds a matrix.
    """
    best, least = jnp.ones(len(w)), np.inf
    for number in range(_POWERS):
        scale = _normalised(mean, number / _POWERS)
        cost = float(_cost(w, rounded(w * scale[:, None]) / scale[:, None], hessian))
        if cost < least:
            best, least = scale, cost
    return best


def clipped(
    w: Float[Array, "inner outer"],
    hessian: Float[Array, "inner inner"],
    group: int,
    rounded: Rounded,
    start: int = 0,
) -> Float[Array, "inner outer"]:
    """A matrix with the largest weights of its groups cut to where the rounded group's outputs are nearest to its own:
    to 1, .95, … .55 of the largest.

    Args:
        w: float32.
        hessian: mean of its inputs' outer products.
        group: weights of a column that share a scale.
        rounded: rounds a matrix.
        start: columns before it are as they are: queries and keys.
    """
    groups = w.reshape(-1, group, w.shape[-1])
    largest = jnp.max(jnp.abs(groups), axis=1, keepdims=True)
    count = len(groups)
    own = hessian.reshape(count, group, count, group)[jnp.arange(count), :, jnp.arange(count), :]
    best, least = groups, jnp.full((count, w.shape[-1]), jnp.inf)
    for number in range(_CLIPS):
        reach = largest * (1 - number / _CLIP_STEPS)
        tried = jnp.clip(groups, -reach, reach)
        cost = _group_costs(groups - rounded(tried.reshape(w.shape)).reshape(groups.shape), own)
        better = cost < least
        best, least = jnp.where(better[:, None], tried, best), jnp.where(better, cost, least)
    return jnp.where(jnp.arange(w.shape[-1]) < start, w, best.reshape(w.shape))


def _normalised(mean: Array, power: float) -> Array:
    scale = jnp.maximum(jnp.maximum(mean, 1e-30) ** power, _LEAST)
    return scale / jnp.sqrt(scale.max() * scale.min())


@jax.jit
def _cost(w: Array, made: Array, hessian: Array) -> Array:
    off = w - made
    return jnp.sum(jnp.matmul(hessian, off, precision="highest") * off)


@jax.jit
def _group_costs(off: Array, hessians: Array) -> Array:
    return jnp.sum(jnp.einsum("gij,gjo->gio", hessians, off, precision="highest") * off, axis=1)


def _folds(stack: Stack) -> Iterator[_Fold]:
    """What can be scaled in a step of the walk, in the order that it is computed in."""
    config, sizes = stack.config, stack.sizes
    queries, keys, values = sizes.qkv
    for place in range(len(stack.period)):
        stem = "" if len(stack.period) == 1 else f"{place}/"
        yield _Fold(f"{stem}attention/qkv/kernel", norm=f"{stem}attention_norm")
        if sizes.heads == sizes.kv_heads and not config.value_embeddings:
            columns = slice(queries + keys, queries + keys + values)
            yield _Fold(f"{stem}attention/out/kernel", writer=(f"{stem}attention/qkv", columns, 1.0))
        yield _Fold(f"{stem}mlp/up/kernel", norm=f"{stem}mlp_norm")
        if sizes.gated or config.activation == "relu2":
            columns, power = slice(sizes.up[0], None) if sizes.gated else slice(None), 1.0 if sizes.gated else 0.5
            yield _Fold(f"{stem}mlp/down/kernel", writer=(f"{stem}mlp/up", columns, power))


def _is_there(fold: _Fold, leaves: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """Whether a matrix is visited, and what computes its inputs is a norm with weights, or visited as well."""
    source = f"{fold.norm}/weight" in leaves if fold.writer is None else f"{fold.writer[0]}/kernel" in names
    return fold.reader in names and source


def _folded(fold: _Fold, scale: Array, leaves: Mapping[str, Array]) -> dict[str, Array]:
    """The parameters that a fold changes."""
    made: dict[str, Array] = {}
    if fold.writer is None:
        weight = leaves[f"{fold.norm}/weight"]
        made[f"{fold.norm}/weight"] = own = (weight / scale).astype(weight.dtype)
        # What the norm's weight was rounded to is made good in the matrix.
        exact = own.astype(jnp.float32)
        scale = jnp.where(exact == 0, scale, weight.astype(jnp.float32) / jnp.where(exact == 0, 1.0, exact))
        if (bias := leaves.get(f"{fold.norm}/bias")) is not None:
            made[f"{fold.norm}/bias"] = (bias / scale).astype(bias.dtype)
    else:
        stem, columns, power = fold.writer
        factors = scale**power
        made[f"{stem}/kernel"] = leaves[f"{stem}/kernel"].astype(jnp.float32).at[:, columns].divide(factors)
        if (bias := leaves.get(f"{stem}/bias")) is not None:
            exact = bias.astype(jnp.float32).at[columns].divide(factors)
            made[f"{stem}/bias"] = exact.astype(bias.dtype)
    made[fold.reader] = leaves[fold.reader].astype(jnp.float32) * scale[:, None]
    return made


def _statistics(
    walk: BlockWalk, block: PyTree, repeat: int, calibration: Calibration, names: tuple[str, ...]
) -> dict[str, tuple[Array, Array]]:
    """Means of the outer products of matrices' inputs, and of their absolute values."""
    own = jax.device_put(block, walk.device)
    sums, count = None, 0
    for x, context in calibration.on(walk.device):
        found = _sums(walk.stack, names)(own, x, context, repeat)
        sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
        count += x.shape[0] * x.shape[1]
    return jax.tree.map(lambda total: total / count, sums)


@lru_cache(maxsize=16)
def _sums(stack: Stack, names: tuple[str, ...]) -> Callable[..., dict[str, tuple[Array, Array]]]:
    """The program that sums over the rows of a microbatch."""

    def sums(block: PyTree, x: Array, context: Context, repeat: Array) -> dict[str, tuple[Array, Array]]:
        seen = watched_block(stack, block, x, context, repeat, {})[1]
        rows = {name: seen[name].rows.astype(jnp.float32) for name in names}
        return {
            name: (jnp.matmul(own.T, own, precision="highest"), jnp.sum(jnp.abs(own), axis=0))
            for name, own in rows.items()
        }

    return jit(sums)
