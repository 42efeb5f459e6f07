"""Rotations of the residual stream, after which no channel has outliers: the model computes the same.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456), section 4, stages 1a and 1b: weights of RMSNorms go into the matrices
that read them, and randomised Hadamard matrices into what reads and writes the stream, and into values and the matrix
after them, per head. The rotations that would run with the model, before `down` for example, are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
from jaxtyping import Float

from cramjax.config import ModelConfig
from cramjax.errors import ModelError
from cramjax.formats.table import flatten, unflatten
from cramjax.language_model import LanguageModel
from cramjax.model import Weight

_LARGEST = 64
"""Rows of a factor of a Hadamard matrix, so that products with it cost little."""


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q: random signs of its rows, times the Kronecker product of some factors."""

    signs: Float[np.ndarray, " width"]
    factors: tuple[Float[np.ndarray, "size size"], ...]

    def __call__(self, x: Float[np.ndarray, "*batch width"]) -> Float[np.ndarray, "*batch width"]:
        """Rows x times Q, float64."""
        made = (x.astype(np.float64) * self.signs).reshape(*x.shape[:-1], *map(len, self.factors))
        for axis, factor in enumerate(self.factors, start=x.ndim - 1):
            made = np.moveaxis(np.moveaxis(made, axis, -1) @ factor, -1, axis)
        return made.reshape(x.shape)

    def rows(self, w: Float[np.ndarray, "*batch width outer"]) -> Float[np.ndarray, "*batch width outer"]:
        """Qᵀ times a matrix, float64."""
        return np.swapaxes(self(np.swapaxes(w, -1, -2)), -1, -2)


def random_rotation(width: int, rng: np.random.Generator) -> Rotation:
    """A randomised Hadamard matrix; of a width that is no power of two, its Kronecker product with a random orthogonal
    matrix as wide as the odd part (576 = 64 · 9).

    Args:
        width: rows.
        rng: of the signs, and of that matrix.
    """
    power, factors = width & -width, []
    while power > 1:
        factors.append(_hadamard(min(power, _LARGEST)))
        power //= len(factors[-1])
    odd = width // (width & -width)
    q, r = np.linalg.qr(rng.normal(size=(odd, odd)))
    factors.append(q * np.sign(np.diag(r)))
    return Rotation(rng.choice([-1.0, 1.0], width), tuple(factors))


def rotated_model(given: LanguageModel, seed: int) -> LanguageModel:
    """A model that computes the same, with its residual stream and the values of its attention rotated.

    Its norms have weights of 1, and its head is a matrix of its own.

    Args:
        given: the model.
        seed: of the rotations.

    Raises:
        ModelError: its architecture does something to the stream that no rotation goes through.
    """
    check_rotation(given.path, given.config)
    model, rng = given.model, np.random.default_rng(seed)
    stream, values = (random_rotation(size, rng) for size in (model.config.width, model.sizes.head_dim))
    leaves = {name: np.asarray(leaf) for name, leaf in flatten(given.params)}
    changed = replace(model, config=replace(model.config, tied=False))
    if model.config.tied:
        leaves["head/decoder/kernel"] = leaves["embed/token/table"].T
    weights = dict(flatten(changed.weights))
    made = {}
    for path, weight in weights.items():
        leaf = leaves[path]
        if weight.role == "norm" and weight.axes == ("embed",):
            made[path] = np.ones_like(leaf)
            continue
        parts = leaf if weight.repeats is not None else leaf[None]  # so that no more than a layer is in float64
        gain = _gain_of(path, leaves) if _reads(weight) else None
        new = [
            _turned(path, weight, part, None if gain is None else gain[index], stream, values, model.sizes.qkv[2])
            for index, part in enumerate(parts)
        ]
        rounded = np.stack([part.astype(leaf.dtype) for part in new])
        made[path] = rounded if weight.repeats is not None else rounded[0]
    return replace(given, model=changed, params=unflatten(made, changed.weights))


def check_rotation(path: Any, config: ModelConfig) -> None:
    """Refuse architectures that a rotation does not go through.

    Raises:
        ModelError: it is one.
    """
    reasons = {
        "subtract a mean (model.norm is layernorm)": config.norm == "layernorm",
        f"are not before what reads the stream alone (model.norm_position is {config.norm_position})": (
            config.norm_position != "pre"
        ),
        "weigh the stream itself after the embedding (model.embedding_norm)": config.embedding_norm
        and config.norm_affine,
        "follow another matrix before the head (model.head_transform)": config.head_transform,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ModelError(f"{path} cannot be rotated, because its norms {reason}: leave rotate out.")
    if config.positions == "sinusoidal":
        raise ModelError(f"{path} cannot be rotated, because its positions are a fixed table: leave rotate out.")


def _reads(weight: Weight) -> bool:
    """Whether a matrix is multiplied with the stream."""
    return len(weight.axes) > 1 and weight.axes[-2] == "embed"


def _writes(weight: Weight) -> bool:
    """Whether a weight is added to the stream, or times something else."""
    return weight.axes[-1:] == ("embed",) and weight.role in ("matrix", "embedding", "bias")


def _gain_of(path: str, leaves: Mapping[str, np.ndarray]) -> Float[np.ndarray, "repeats embed"] | None:
    """The weight of the norm whose results a matrix reads, by layer; None: it has none."""
    if path.startswith("head/"):
        gain = leaves.get("head/norm/weight")
        return None if gain is None else gain[None]
    # blocks/attention/qkv/kernel, or blocks/1/mlp/up/kernel where blocks differ
    for part in ("attention", "mlp", "experts"):
        stem, found, _ = path.partition(f"/{part}/")
        if found:
            return leaves.get(f"{stem}/{'attention' if part == 'attention' else 'mlp'}_norm/weight")
    raise AssertionError(f"{path} reads the stream, and no norm is known to be before it")


def _turned(
    path: str,
    weight: Weight,
    leaf: np.ndarray,
    gain: np.ndarray | None,
    stream: Rotation,
    values: Rotation,
    columns: int,
) -> np.ndarray:
    """One layer's weight with the rotations of what it reads and writes. The last `columns` of a projection of queries,
    keys and values are values.
    """
    if _reads(weight):
        exact = leaf.astype(np.float64)
        leaf = stream.rows(exact if gain is None else exact * gain.astype(np.float64)[:, None])
    if _writes(weight):
        leaf = stream(leaf)
    if "/attention/qkv/" in path:
        leaf = np.concatenate([leaf[..., :-columns], _by_head(values, leaf[..., -columns:])], axis=-1)
    elif "/attention/out/kernel" in path:
        leaf = _by_head(values, leaf.T).T
    elif path == "embed/value/table":
        leaf = _by_head(values, leaf)
    return leaf


def _by_head(rotation: Rotation, x: Float[np.ndarray, "*batch heads"]) -> Float[np.ndarray, "*batch heads"]:
    """Rows in stretches as wide as a head, each rotated."""
    width = len(rotation.signs)
    return rotation(x.reshape(*x.shape[:-1], -1, width)).reshape(x.shape)


def _hadamard(size: int) -> Float[np.ndarray, "size size"]:
    """Sylvester's, orthogonal; of a power of two."""
    two = np.asarray([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)
    return reduce(np.kron, [two] * (size.bit_length() - 1), np.ones((1, 1)))
