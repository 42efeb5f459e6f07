"""Muon's direction: the momentum of every matrix, replaced by its nearest orthogonal matrix (about).

Matrices come stacked on leading axes and sometimes fused side by side. Each is orthogonalised on its own, but those of
one shape, of whichever parameters, are iterated on together and in a loop: few distinct products, which a compiler for
GPUs tries out one by one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from cramjax.axes import SHARD_AXIS
from cramjax.devices import target
from cramjax.kernels.mesh import mesh_axes
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

    def apart(path: tuple[Any, ...], x: Array) -> list[Array]:
        widths = splits.get(path_name(path), (x.shape[-1],))
        return jnp.split(x, np.cumsum(widths)[:-1].tolist(), axis=-1)

    def update(updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None):
        del params
        matrices, structure = jax.tree.flatten(jax.tree_util.tree_map_with_path(apart, updates))
        done = [max(1.0, x.shape[-1] / x.shape[-2]) ** 0.5 * x for x in orthogonalize(matrices, steps)]
        pieces = jax.tree.unflatten(structure, done)
        return jax.tree.map(lambda _, own: jnp.concatenate(own, axis=-1), updates, pieces), state

    orthogonalized = optax.GradientTransformation(optax.init_empty_state, update)  # pyright: ignore[reportArgumentType]
    return optax.chain(optax.trace(momentum, nesterov=True), orthogonalized)


def orthogonalize(
    matrices: Sequence[Float[Array, "*_stack _rows _columns"]], steps: int
) -> list[Float[Array, "*_stack _rows _columns"]]:
    """The polar factor U·Vᵀ of each matrix U·Σ·Vᵀ, about, by products alone.

    Each iteration applies an odd quintic X ← (aI + bXXᵀ + c(XXᵀ)²)X to the singular values: of float32 on CPUs, of
    bfloat16 on other devices, whose products then run at full speed. Sums and norms are float32 on all of them.
    Rounding to bfloat16 leaves the range of the singular values; the result as a whole moves by 1 to 7% of its
    Frobenius norm, most where singular values fall off fast, in directions that were below 1% of the norm.

    Args:
        matrices: Arrays of matrices, stacked on any leading axes. Those of one shape, tall ones transposed, are
            iterated on together; devices that share the parameters share them out, whole.
        steps: Iterations, at least one.

    Returns:
        Matrices of the same shapes, float32. After 5 iterations, singular values that were above 1% of the Frobenius
        norm lie between 0.68 (in bfloat16 0.67) and 1.21. A zero matrix stays zero.
    """
    dtype = jnp.float32 if target().platform == "cpu" else jnp.bfloat16
    stacks = [_wide(_normalised(x).astype(dtype)) for x in matrices]
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for place, stack in enumerate(stacks):
        by_shape.setdefault(stack.shape[1:], []).append(place)
    done: dict[int, Array] = {}
    for places in by_shape.values():
        together = _shared(_iterate(_shared(jnp.concatenate([stacks[place] for place in places])), steps))
        ends = np.cumsum([len(stacks[place]) for place in places])
        done |= zip(places, jnp.split(together, ends[:-1].tolist()), strict=True)
    return [_shaped_as(x, done[place].astype(jnp.float32)) for place, x in enumerate(matrices)]


def _iterate(x: Float[Array, "matrices rows columns"], steps: int) -> Float[Array, "matrices rows columns"]:
    """The quintic, so many times, on matrices that are at least as wide as high.

    In float32, those more than 1.5 times as wide are cheaper to do by the small Gram matrix R = XXᵀ: the polynomials
    all commute with R, so their product is collected, and multiplied with X once. Rounding in R is amplified by up to
    the square of the slope at 0 for each iteration. In bfloat16 that is too much: of a matrix with singular values
    1, 1/2, 1/3, … came one with singular values up to 587.
    """
    with jax.default_matmul_precision("highest"):
        if x.dtype == jnp.float32 and x.shape[-1] > 1.5 * x.shape[-2]:
            return _product_of_polynomials(x @ _transpose(x), steps) @ x
        return jax.lax.fori_loop(0, steps, lambda _, x: _polynomial(x @ _transpose(x)) @ x, x)


def _product_of_polynomials(gram: Array, steps: int) -> Array:
    def step(_: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        gram, polynomial, product = carry
        gram = polynomial @ (polynomial @ gram)
        polynomial = _polynomial(gram)
        return gram, polynomial, polynomial @ product

    first = _polynomial(gram)
    return jax.lax.fori_loop(1, steps, step, (gram, first, first))[-1]


def _polynomial(gram: Array) -> Array:
    """What the quintic multiplies a matrix with: its terms are added in float32."""
    a, b, c = _QUINTIC
    linear, square = gram.astype(jnp.float32), (gram @ gram).astype(jnp.float32)
    return (a * jnp.eye(gram.shape[-1]) + b * linear + c * square).astype(gram.dtype)


def _normalised(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)


def _shared(stack: Array) -> Array:
    """Each of the devices that share the parameters has some of the matrices, whole: none waits for another's sums."""
    return jax.lax.with_sharding_constraint(stack, jax.P(SHARD_AXIS)) if SHARD_AXIS in mesh_axes() else stack


def _wide(x: Array) -> Array:
    """All matrices in one stack, tall ones transposed."""
    x = x.reshape(-1, *x.shape[-2:])
    return _transpose(x) if x.shape[-2] > x.shape[-1] else x


def _shaped_as(x: Array, wide: Array) -> Array:
    """The stack `wide` as `_wide` found it in x."""
    return (_transpose(wide) if x.shape[-2] > x.shape[-1] else wide).reshape(x.shape)


def _transpose(x: Array) -> Array:
    return x.swapaxes(-1, -2)
