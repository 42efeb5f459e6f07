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

from cramjax.compress.grid import GroupGrid, TernaryGrid
from cramjax.compression import COLUMNS
from cramjax.errors import ModelError

_LARGEST_DAMP = 1.0


@dataclass(frozen=True)
class Factor:
    """A Hessian ready for `solve`."""

    u: Float[Array, "inner inner"]
    """U, of inputs in the order that they are visited in."""
    damp: float
    """What was added to the diagonal, as a share of its mean."""


def factor(hessian: Float[Array, "inner inner"], damp: float) -> Factor:
    """Factor the inverse of a Hessian, with as little added to its diagonal as that takes.

    Args:
        hessian: float32, finite, without a 0 on its diagonal.
        damp: share of the diagonal's mean that is added at first; it doubles (from 0: is 0.01) until the Cholesky
            decomposition succeeds.

    Raises:
        ModelError: it does not, with the whole mean added.
    """
    tried = damp
    while True:
        u = _factor(hessian, jnp.float32(tried))
        if bool(jnp.isfinite(u).all()):
            return Factor(u, tried)
        if tried >= _LARGEST_DAMP:
            raise ModelError(
                f"its Hessian of {len(hessian)} inputs cannot be factored, even with {tried:g} of the mean of its "
                "diagonal added: look for inputs of enormous size, or calibrate on other text."
            )
        tried = min(_LARGEST_DAMP, 2 * tried) or 0.01


@jax.jit
def _factor(hessian: Array, damp: Array) -> Array:
    size = len(hessian)
    damped = hessian + damp * jnp.mean(jnp.diag(hessian)) * jnp.eye(size, dtype=hessian.dtype)
    # The flipped lower factor of the flipped H is an upper R with H = R·Rᵀ, so U = R⁻¹: one decomposition in the place
    # of three, and more exact in float32.
    r = jnp.flip(jnp.linalg.cholesky(jnp.flip(damped)))
    return jax.scipy.linalg.solve_triangular(r, jnp.eye(size, dtype=r.dtype), lower=False)


def solve(
    w: Float[Array, "inner outer"],
    u: Float[Array, "inner inner"],
    *,
    grid: GroupGrid | TernaryGrid | None = None,
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
    blocks = -(-inner // COLUMNS)
    visited = jnp.arange(inner) if order is None else order
    group_of = visited // (inner // (1 if grid is None else grid.groups))
    limits = None
    if sparsity is not None:
        sizes = [min(COLUMNS, inner - COLUMNS * block) * outer for block in range(blocks)]
        limits = np.asarray([min(math.floor(size * sparsity), size - 1) for size in sizes], np.int32)
    made = _solve(w[visited], u, grid, group_of, limits, kept)
    return jnp.zeros_like(made).at[visited].set(made)


@functools.partial(jax.jit, static_argnums=5)
def _solve(
    w: Array,
    u: Array,
    grid: GroupGrid | TernaryGrid | None,
    group_of: Array,
    limits: Any,
    kept: tuple[int, int] | None,
) -> Array:
    inner, outer = w.shape
    blocks = -(-inner // COLUMNS)
    more = blocks * COLUMNS - inner
    # Inputs that fill up the last block: apart from all others, and 0.
    w, group_of = jnp.pad(w, ((0, more), (0, 0))), jnp.pad(group_of, (0, more))
    u = jnp.pad(u, (0, more)) + jnp.diag((jnp.arange(len(w)) >= inner).astype(u.dtype))

    def rounded(own: Array, group: Array) -> Array:
        return own if grid is None else grid.rounded(own, group)

    def block(number: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        w, done = carry
        start = number * COLUMNS
        rows = jax.lax.dynamic_slice_in_dim(u, start, COLUMNS)
        own, square = (jax.lax.dynamic_slice_in_dim(x, start, COLUMNS, axis) for x, axis in ((w, 0), (rows, 1)))
        groups = jax.lax.dynamic_slice_in_dim(group_of, start, COLUMNS)
        diagonal = jnp.diag(square)
        gone = jnp.zeros(own.shape, bool)
        if limits is not None:
            real = (start + jnp.arange(COLUMNS) < inner)[:, None]
            costs = jnp.where(real, (own / diagonal[:, None]) ** 2, jnp.inf)
            gone = costs <= jnp.sort(costs.reshape(-1))[limits[number]]

        def step(i: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            own, gone, errors, made = carry
            if kept is not None:
                n, m = kept

                def chosen() -> Array:
                    some = (
                        jax.lax.dynamic_slice_in_dim(own, i, m) / jax.lax.dynamic_slice_in_dim(diagonal, i, m)[:, None]
                    )
                    ranks = jnp.argsort(jnp.argsort(some**2, axis=0), axis=0)
                    return jax.lax.dynamic_update_slice_in_dim(gone, ranks < m - n, i, 0)

                gone = jax.lax.cond(i % m == 0, chosen, lambda: gone)
            before = own[i]
            after = rounded(jnp.where(gone[i], 0.0, before), groups[i])
            error = (before - after) / diagonal[i]
            own = own - square[i][:, None] * error
            return own, gone, errors.at[i].set(error), made.at[i].set(after)

        empty = jnp.zeros_like(own)
        _, _, errors, made = jax.lax.fori_loop(0, COLUMNS, step, (own, gone, empty, empty))
        w = w - jnp.matmul(rows.T, errors, precision="highest")
        return w, jax.lax.dynamic_update_slice_in_dim(done, made, start, 0)

    return jax.lax.fori_loop(0, blocks, block, (w, jnp.zeros_like(w)))[1][:inner]
