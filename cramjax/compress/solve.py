"""The loop of GPTQ and SparseGPT: inputs one after the other are rounded or set to 0, and what that does to the outputs
is made good by the weights of the inputs after them.

Frantar et al. 2022 (arXiv:2210.17323, algorithm 1), Frantar and Alistarh 2023 (arXiv:2301.00774, algorithm 1). With H
the sum of the inputs' outer products and H⁻¹ = UᵀU, U upper: the error e = (w - q) / Uᵢᵢ of input i takes e · Uᵢⱼ off
the weights of each input j > i. Both codes are this one function.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cramjax.compress.grid import Grid
from cramjax.compression import COLUMNS
from cramjax.errors import ModelError

_LARGEST_DAMP = 1.0
_AT_ONCE = 16
"""Inputs that correct each other one by one, before those after them are corrected at once."""


@dataclass(frozen=True)
class Factor:
    """A Hessian ready for `solve`."""

    u: Float[Array, "inner inner"]
    """U, of inputs in the order that they are visited in."""
    damp: float
    """What was added to the diagonal, as a share of its mean."""


def factor(hessian: Float[Array, "inner inner"], damp: float, order: Int[Array, " inner"] | None = None) -> Factor:
    """Factor the inverse of a Hessian, with as little added to its diagonal as that takes.

    Args:
        hessian: float32, finite. Where its diagonal is 0 it is taken to be 1.
        damp: share of the diagonal's mean that is added at first; it doubles (from 0: is 0.01) until the Cholesky
            decomposition succeeds.
        order: inputs as they are visited. Default: as they are.

    Raises:
        ModelError: it does not, with the whole mean added.
    """
    tried = damp
    backwards = jnp.arange(len(hessian))[::-1] if order is None else order[::-1]
    while True:
        u = _factor(hessian, jnp.float32(tried), backwards)
        if bool(jnp.isfinite(jnp.diag(u)).all()):  # of a factor that is not finite, the last input is not
            return Factor(u, tried)
        if tried >= _LARGEST_DAMP:
            raise ModelError(
                f"its Hessian of {len(hessian)} inputs cannot be factored, even with {tried:g} of the mean of its "
                "diagonal added: look for inputs of enormous size, or calibrate on other text."
            )
        tried = min(_LARGEST_DAMP, 2 * tried) or 0.01


@jax.jit
def _factor(hessian: Array, damp: Array, backwards: Array) -> Array:
    # With the inputs turned round, H = L·Lᵀ is R·Rᵀ of an upper R, so U = R⁻¹ is L⁻¹ turned round: one decomposition in
    # the place of three, and more exact in float32.
    diagonal = jnp.diag(hessian)
    diagonal = jnp.where(diagonal == 0, 1.0, diagonal)
    diagonal = diagonal + damp * jnp.mean(diagonal)
    everywhere = jnp.arange(len(hessian))
    turned = hessian[backwards[:, None], backwards].at[everywhere, everywhere].set(diagonal[backwards])
    lower = jax.lax.linalg.cholesky(turned, symmetrize_input=False)
    identity = jnp.eye(len(hessian), dtype=lower.dtype)
    return jnp.flip(jax.scipy.linalg.solve_triangular(lower, identity, lower=True))


def solve(
    w: Float[Array, "inner outer"],
    u: Float[Array, "inner inner"],
    *,
    grid: Grid | None = None,
    order: Int[Array, " inner"] | None = None,
    kept: tuple[int, int] | None = None,
    sparsity: float | None = None,
) -> Float[Array, "inner outer"]:
    """A matrix on a grid, or with zeros, or both, whose outputs are near its own.

    Args:
        w: float32; 0 for inputs that never are anything else.
        u: from `factor`, of inputs in `order`.
        grid: what is rounded to; None: nothing is.
        order: inputs as they are visited. Default: as they are.
        kept: N and M: of every M inputs N weights stay, by the least w² / Uᵢᵢ² of the corrected weights.
        sparsity: share of weights that become 0, of each 128 inputs' together; by the same.

    Returns:
        The weights in their own order, float32; on a grid, exactly.
    """
    inner, outer = w.shape
    visited = jnp.arange(inner) if order is None else order
    group_of = visited // (inner // (1 if grid is None else grid.groups))
    limits = None
    if sparsity is not None:
        sizes = [min(COLUMNS, inner - start) * outer for start in range(0, inner, COLUMNS)]
        limits = np.asarray([min(math.floor(size * sparsity), size - 1) for size in sizes], np.int32)
    return _solve(w, u, grid, visited, group_of, limits, kept)


@functools.partial(jax.jit, static_argnames="kept")
def _solve(
    w: Array,
    u: Array,
    grid: Grid | None,
    visited: Array,
    group_of: Array,
    limits: Any,
    kept: tuple[int, int] | None,
) -> Array:
    inner = len(w)
    blocks = -(-inner // COLUMNS)
    more = blocks * COLUMNS - inner
    # Inputs that fill up the last block: apart from all others, and 0.
    w, group_of = jnp.pad(w[visited], ((0, more), (0, 0))), jnp.pad(group_of, (0, more))
    if more:
        u = jnp.pad(u, (0, more)) + jnp.diag((jnp.arange(len(w)) >= inner).astype(u.dtype))

    def block(number: Any, w: Array) -> Array:
        start = number * COLUMNS
        own, groups = (jax.lax.dynamic_slice_in_dim(x, start, COLUMNS) for x in (w, group_of))
        square = jax.lax.dynamic_slice(u, (start, start), (COLUMNS, COLUMNS))
        gone = jnp.zeros(own.shape, bool)
        if limits is not None:
            real = (start + jnp.arange(COLUMNS) < inner)[:, None]
            costs = jnp.where(real, (own / jnp.diag(square)[:, None]) ** 2, jnp.inf)
            gone = costs <= jnp.sort(costs.reshape(-1))[limits[number]]
        made, errors = _block(own, square, gone, groups, grid, kept)

        def later(place: Any, w: Array) -> Array:
            rows = place * COLUMNS
            by = jax.lax.dynamic_slice(u, (start, rows), (COLUMNS, COLUMNS))
            them = jax.lax.dynamic_slice_in_dim(w, rows, COLUMNS) - jnp.matmul(by.T, errors, precision="highest")
            return jax.lax.dynamic_update_slice_in_dim(w, them, rows, 0)

        w = jax.lax.dynamic_update_slice_in_dim(w, made, start, 0)
        return jax.lax.fori_loop(number + 1, blocks, later, w)

    made = jax.lax.fori_loop(0, blocks, block, w)[:inner]
    return jnp.zeros_like(made).at[visited].set(made, unique_indices=True)


def _block(
    own: Array,
    square: Array,
    gone: Array,
    groups: Array,
    grid: Grid | None,
    kept: tuple[int, int] | None,
) -> tuple[Array, Array]:
    """What becomes of a block of inputs, and their errors, which the inputs after it are still to make good.

    Some inputs are done at a time, which fit a cache; then those after them in the block are corrected at once.
    """
    at_once = _AT_ONCE if kept is None else max(_AT_ONCE, kept[1])
    diagonal = jnp.diag(square)

    def some(number: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        own, errors = carry
        start = number * at_once
        part, drop, pivots, group = (
            jax.lax.dynamic_slice_in_dim(x, start, at_once) for x in (own, gone, diagonal, groups)
        )
        rows = jax.lax.dynamic_slice_in_dim(square, start, at_once)
        within = jax.lax.dynamic_slice_in_dim(rows, start, at_once, 1)

        def step(i: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            part, drop, errors = carry
            if kept is not None:
                n, m = kept
                drop = jax.lax.cond(i % m == 0, lambda: _dropped(part, drop, pivots, i, n, m), lambda: drop)
            before = part[i]
            after = jnp.where(drop[i], 0.0, before)
            after = after if grid is None else grid.rounded(after, group[i])
            error = (before - after) / pivots[i]
            # Of inputs that are done, what U holds is 0: they stay.
            return (part - within[i][:, None] * error).at[i].set(after), drop, errors.at[i].set(error)

        part, _, found = jax.lax.fori_loop(0, at_once, step, (part, drop, jnp.zeros_like(part)))
        own = own - jnp.matmul(rows.T, found, precision="highest")
        own = jax.lax.dynamic_update_slice_in_dim(own, part, start, 0)
        return own, jax.lax.dynamic_update_slice_in_dim(errors, found, start, 0)

    return jax.lax.fori_loop(0, COLUMNS // at_once, some, (own, jnp.zeros_like(own)))


def _dropped(part: Array, drop: Array, pivots: Array, start: Any, n: int, m: int) -> Array:
    """The weights that go, with the choice for the next M inputs."""
    some = jax.lax.dynamic_slice_in_dim(part, start, m) / jax.lax.dynamic_slice_in_dim(pivots, start, m)[:, None]
    ranks = jnp.argsort(jnp.argsort(some**2, axis=0), axis=0)
    return jax.lax.dynamic_update_slice_in_dim(drop, ranks < m - n, start, 0)
