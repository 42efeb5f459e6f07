"""One matrix rewritten by a method, from its weights and the Hessian of its inputs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cramjax.compress.awq import clipped
from cramjax.compress.float_grid import find_float_grid
from cramjax.compress.grid import Grid, find_grid, find_ternary_grid
from cramjax.compress.hqq import find_refined_grid
from cramjax.compress.solve import factor, solve
from cramjax.compression import CompressConfig
from cramjax.kernels.packed import float_refusal, quantisation_refusal, unpacked


@dataclass(frozen=True)
class Rewritten:
    """A matrix after its compression."""

    leaf: Any
    """What stands for it among the parameters: a packed leaf, or an array as precise as the model's."""
    weights: Float[Array, "inner outer"]
    """The same as an array."""
    error: float
    """What the outputs for the calibration's inputs are off by, as a share of their energy (squared); without such
    inputs, of the weights."""
    zeros: float
    """Share of weights that are 0."""
    damp: float | None = None
    """What was added to the Hessian's diagonal, as a share of its mean; None: nothing was."""
    dead: int = 0
    """Inputs that were always 0, whose weights were set to 0."""
    unseen: int = 0
    """Experts that no row of the text was sent to, whose weights were rounded to the nearest."""


def rewrite(
    w: Float[Array, "inner outer"],
    hessian: Float[Array, "inner inner"] | None,
    config: CompressConfig,
    *,
    first_clipped: int = 0,
) -> Rewritten:
    """Compress one matrix.

    Args:
        w: its weights.
        hessian: mean of its inputs' outer products, float32 and finite; None: nothing is known of them.
        config: resolved; its groups divide the matrix.
        first_clipped: column from which on AWQ clips.

    Raises:
        ModelError: the Hessian cannot be factored.
    """
    exact, dtype = w.astype(jnp.float32), w.dtype
    own, damp, dead = exact, None, 0
    if config.awq and config.method == "rtn" and hessian is not None:
        group = group_of(config, w.shape[0])
        own = clipped(exact, hessian, group, lambda x: rounded_to_nearest(x, config), first_clipped)
    grid = grid_of(own, config)
    if config.method in ("gptq", "sparsegpt"):
        assert hessian is not None, "what is calibrated has inputs"
        own, damp, dead = _corrected(exact, hessian, config, grid)
    elif config.method in ("magnitude", "wanda"):
        own = jnp.where(_least(exact, hessian, config), 0.0, exact)
    leaf = own.astype(dtype) if grid is None else grid.leaf(own)
    weights = unpacked(leaf).astype(jnp.float32)
    error, zeros = _measured(exact, weights, hessian)
    return Rewritten(leaf, weights, float(error), float(zeros), damp, dead)


def rewrite_experts(
    w: Float[Array, "experts inner outer"],
    hessians: Float[Array, "experts inner inner"] | None,
    config: CompressConfig,
    stacked: Callable[..., Any],
) -> Rewritten:
    """Compress the matrices of a block's experts, each by itself, by the inputs that it was sent.

    One that was sent none is rounded to the nearest, or loses its smallest weights: of it nothing is known (Frantar and
    Alistarh 2023, arXiv:2310.16795, section 3.2).

    Args:
        w: their weights.
        hessians: as of `rewrite`; 0 of an expert that was sent nothing.
        config: resolved.
        stacked: makes one leaf of several.

    Raises:
        ModelError: a Hessian cannot be factored.
    """
    method = {"gptq": "rtn", "wanda": "magnitude", "sparsegpt": "magnitude"}.get(config.method, config.method)
    blind: CompressConfig = replace(config, method=method, act_order=False)
    seen = [hessians is not None and bool(jnp.trace(hessians[expert]) > 0) for expert in range(len(w))]
    made = []
    for expert, own in enumerate(w):
        known = hessians[expert] if hessians is not None and seen[expert] else None
        made.append(rewrite(own, known, config if hessians is None or seen[expert] else blind))
    damps = [each.damp for each in made if each.damp is not None]
    return Rewritten(
        stacked(*(each.leaf for each in made)),
        jnp.stack([each.weights for each in made]),
        sum(each.error for each in made) / len(made),
        sum(each.zeros for each in made) / len(made),
        max(damps) if damps else None,
        sum(each.dead for each in made),
        0 if hessians is None else len(made) - sum(seen),
    )


def grid_of(w: Float[Array, "inner outer"], config: CompressConfig) -> Grid | None:
    """What a matrix, in float32, is rounded to; None: to nothing."""
    if config.bits is None:
        return None
    if config.bits == "ternary":
        return find_ternary_grid(w, means=config.levels == "means")
    options: dict[str, Any] = {"group": group_of(config, w.shape[0]), "scale_dtype": config.scale_dtype}
    if config.method == "hqq":
        return find_refined_grid(w, bits=config.bits, **options)  # pyright: ignore[reportArgumentType]
    if isinstance(config.bits, str):
        return find_float_grid(w, kind=config.bits, mse=config.mse, **options)
    return find_grid(w, bits=config.bits, symmetric=config.symmetric, mse=config.mse, **options)


def rounded_to_nearest(w: Float[Array, "inner outer"], config: CompressConfig) -> Float[Array, "inner outer"]:
    """A matrix as it is after its rounding to the nearest, float32; its own inputs have no part in it."""
    grid = grid_of(w, config)
    assert grid is not None, "what is rounded has bits"
    return grid.rounded(w, jnp.arange(len(w)) // (len(w) // grid.groups))


def group_of(config: CompressConfig, inner: int) -> int:
    """Inputs that share a scale, of a matrix with so many."""
    return inner if config.group is None else min(config.group, inner)


def refusal(config: CompressConfig, shape: tuple[int, ...]) -> str | None:
    """Why a matrix (inner, outer) cannot be kept as a configuration says; None: it can."""
    if config.bits is None or config.bits == "ternary":
        return None
    group = group_of(config, shape[0])
    if isinstance(config.bits, str):
        return float_refusal(shape, config.bits, group)
    return quantisation_refusal(shape, config.bits, group)


def _corrected(w: Array, hessian: Array, config: CompressConfig, grid: Grid | None) -> tuple[Array, float, int]:
    diagonal = jnp.diag(hessian)
    dead = diagonal == 0
    order = jnp.argsort(-jnp.where(dead, 1.0, diagonal)) if config.act_order else None
    factored = factor(hessian, config.damp, order)
    alive = jnp.where(dead[:, None], 0.0, w)
    options = {"kept": config.kept, "sparsity": config.sparsity or None}
    return solve(alive, factored.u, grid=grid, order=order, **options), factored.damp, int(dead.sum())


def _least(w: Array, hessian: Array | None, config: CompressConfig) -> Bool[Array, "inner outer"]:
    """The weights that are set to 0 where none are corrected: by size in all of the matrix, by size times that of the
    input in each column (Wanda), or in each stretch of a column that a pattern is of.
    """
    score = jnp.abs(w)
    if config.method == "wanda":
        assert hessian is not None, "what is calibrated has inputs"
        score = score * jnp.sqrt(jnp.diag(hessian))[:, None]
    if config.kept is not None:
        n, m = config.kept
        parts = score.reshape(-1, m, w.shape[-1])
        ranks = jnp.argsort(jnp.argsort(parts, axis=1), axis=1)
        return (ranks < m - n).reshape(w.shape)
    assert config.sparsity is not None, "a resolved configuration of a method that prunes says how much"
    if config.method == "wanda":
        ranks = jnp.argsort(jnp.argsort(score, axis=0), axis=0)
        return ranks < int(w.shape[0] * config.sparsity)
    ranks = jnp.argsort(jnp.argsort(score.reshape(-1)))
    return (ranks < int(w.size * config.sparsity)).reshape(w.shape)


@jax.jit
def _measured(exact: Array, made: Array, hessian: Array | None) -> tuple[Array, Array]:
    def energy(w: Array) -> Array:
        through = w if hessian is None else jnp.matmul(hessian, w, precision="highest")
        return jnp.sum(through * w)

    whole = energy(exact)
    return energy(exact - made) / jnp.where(whole == 0, 1.0, whole), jnp.mean(made == 0)
