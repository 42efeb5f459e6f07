"""Muon's direction: the momentum of every matrix, replaced by its nearest orthogonal matrix (about).

Matrices come stacked on leading axes and sometimes fused side by side; each one is orthogonalised on its own. The
products are float32; a quarter of what `optax.contrib.scale_by_muon` spends on a block is saved by iterating on the
Gram matrix of wide and tall matrices (see `orthogonalize`).
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from cramjax.optim.groups import path_name

# Jordan et al. 2024: the odd quintic whose slope at 0 is largest among those that keep singular values near 1. The
# Polar Express (Amsel et al. 2025) gets nearer to 1 for the same work and trained slightly worse: benchmarks/LOG.md.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def scale_by_muon(
    momentum: float, steps: int, splits: Mapping[str, Sequence[int]] | None = None
) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised per matrix and scaled by its shape.

    The update of a matrix that maps `rows` inputs to `columns` outputs is max(1, columns / rows)^½ times the
    orthogonalised momentum: Jordan et al. 2024 ("Muon"), whose matrices are stored the other way round. Iteration
    and scale are those of `optax.contrib.muon` without `consistent_rms`; the momentum has no bias correction.

    Args:
        momentum: Decay of the momentum.
        steps: Iterations of `orthogonalize`.
        splits: Path of a parameter → widths of the matrices that its last axis holds side by side.

    Returns:
        A transformation of trees whose leaves are all `[..., rows, columns]`.
    """
    splits = splits or {}

    def update(updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None):
        del params
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, x: _each_matrix(x, steps, splits.get(path_name(path), (x.shape[-1],))), updates
        )
        return scaled, state

    orthogonalized = optax.GradientTransformation(optax.init_empty_state, update)  # pyright: ignore[reportArgumentType]
    return optax.chain(optax.trace(momentum, nesterov=True), orthogonalized)


def orthogonalize(x: Float[Array, "*stack rows columns"], steps: int) -> Float[Array, "*stack rows columns"]:
    """The polar factor U·Vᵀ of each matrix U·Σ·Vᵀ, about, by products alone.

    Each iteration applies an odd quintic X ← aX + b(XXᵀ)X + c(XXᵀ)²X to the singular values. For matrices more than
    1.5 times as wide as high it is cheaper to iterate on the small Gram matrix R = XXᵀ and to collect the product Q
    of the polynomials, which all commute with R, then to multiply once: Q·X. Rounding in R is amplified by up to the
    square of the slope at 0 for each iteration, so this form needs full float32.

    Args:
        x: Matrices, stacked on any leading axes.
        steps: Iterations.

    Returns:
        Matrices of the same shapes. After 5 iterations, singular values that were above 1% of the Frobenius norm lie
        between 0.68 and 1.21. A zero matrix stays zero.
    """
    if x.shape[-2] > x.shape[-1]:
        return _transpose(orthogonalize(_transpose(x), steps))
    rows, columns = x.shape[-2:]
    a, b, c = _QUINTIC
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    with jax.default_matmul_precision("highest"):
        if columns > 1.5 * rows:
            return _polynomial_of_gram(x @ _transpose(x), steps) @ x
        for _ in range(steps):
            gram = x @ _transpose(x)
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return x


def _polynomial_of_gram(gram: Array, steps: int) -> Array:
    a, b, c = _QUINTIC
    collected = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    for step in range(steps):
        rest = b * gram + c * (gram @ gram)
        collected = a * collected + (rest @ collected if step else rest)
        if step + 1 < steps:
            half = a * gram + rest @ gram
            gram = a * half + rest @ half
    return collected


def _each_matrix(x: Array, steps: int, widths: Sequence[int]) -> Array:
    offsets = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    pieces = jnp.split(x, offsets, axis=-1)
    done = [max(1.0, p.shape[-1] / p.shape[-2]) ** 0.5 * orthogonalize(p, steps) for p in pieces]
    return done[0] if len(done) == 1 else jnp.concatenate(done, axis=-1)


def _transpose(x: Array) -> Array:
    return x.swapaxes(-1, -2)
