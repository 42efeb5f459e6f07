"""Muon's direction: the momentum of every matrix, replaced by its nearest orthogonal matrix (about).

Matrices come stacked on leading axes and sometimes fused side by side; each one is orthogonalised on its own. The
products are float32: they are a small share of a step, and half of what `optax.contrib.scale_by_muon` spends on wide
matrices is saved by iterating on the Gram matrix (see `orthogonalize`).
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from cramjax.optim.groups import path_name

# The optimal odd quintics for singular values in [1e-3, 1], one per iteration (Amsel et al. 2025, "The Polar Express",
# Appendix; each divided by its safety factor 1.01). Iterations beyond the list repeat Newton–Schulz's limit.
_SAFETY = 1.01
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_LIMIT = (1.875, -1.25, 0.375)


def scale_by_muon(
    momentum: float, steps: int, splits: Mapping[str, Sequence[int]] | None = None
) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised per matrix and scaled by its shape.

    The update of a matrix that maps `rows` inputs to `columns` outputs is max(1, columns / rows)^½ times the
    orthogonalised momentum: Jordan et al. 2024 ("Muon"), whose matrices are stored the other way round. It is
    `optax.contrib.scale_by_muon` followed by its shape scaling without `consistent_rms`.

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
    of the polynomials, which all commute with R, then to multiply once: Q·X. Rounding in R is amplified by at most
    the square of the polynomials' slopes at 0, so this form needs full float32.

    Args:
        x: Matrices, stacked on any leading axes.
        steps: Iterations, each with its own coefficients.

    Returns:
        Matrices of the same shapes. After 5 iterations singular values that were above 1e-3 of the Frobenius norm lie
        in 1 ± 0.15. A zero matrix stays zero.
    """
    if x.shape[-2] > x.shape[-1]:
        return _transpose(orthogonalize(_transpose(x), steps))
    rows, columns = x.shape[-2:]
    x = x / (_SAFETY * jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    with jax.default_matmul_precision("highest"):
        if columns > 1.5 * rows:
            return _polynomial_of_gram(x @ _transpose(x), steps) @ x
        for a, b, c in _coefficients(steps):
            gram = x @ _transpose(x)
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return x


def _polynomial_of_gram(gram: Array, steps: int) -> Array:
    collected = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    for step, (a, b, c) in enumerate(_coefficients(steps)):
        rest = b * gram + c * (gram @ gram)
        collected = a * collected + (rest @ collected if step else rest)
        if step + 1 < steps:
            half = a * gram + rest @ gram
            gram = a * half + rest @ half
    return collected


def _coefficients(steps: int) -> list[tuple[float, float, float]]:
    safe = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:steps]]
    return safe + [_LIMIT] * (steps - len(safe))


def _each_matrix(x: Array, steps: int, widths: Sequence[int]) -> Array:
    offsets = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    pieces = jnp.split(x, offsets, axis=-1)
    done = [max(1.0, p.shape[-1] / p.shape[-2]) ** 0.5 * orthogonalize(p, steps) for p in pieces]
    return done[0] if len(done) == 1 else jnp.concatenate(done, axis=-1)


def _transpose(x: Array) -> Array:
    return x.swapaxes(-1, -2)
