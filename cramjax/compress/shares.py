"""How many weights of each matrix are set to 0: by patterns of names, or more where a block has fewer outliers."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from cramjax.compress.walk import BlockWalk, Calibration
from cramjax.compression import CompressConfig
from cramjax.errors import ConfigError

_OUTLIER, _SPREAD = 5.0, 0.08
"""OWL's M: how many times the mean is an outlier; and λ: how far a block's share may be from the mean."""


def check_patterns(shares: Mapping[str, float], names: Sequence[str], repeats: int) -> None:
    """Refuse patterns that are of no matrix.

    Raises:
        ConfigError: one is.
    """
    paths = [f"{repeat}/{name}" for repeat in range(repeats) for name in names]
    for pattern in shares:
        if not fnmatch.filter(paths, pattern):
            raise ConfigError(
                f"shares: {pattern!r} is the name of no matrix; they are {paths[0]} to {paths[-1]}, and * stands for "
                "anything."
            )


def with_share(config: CompressConfig, repeat: int, name: str, of_blocks: Sequence[float] | None) -> CompressConfig:
    """A configuration with the share of one matrix: that of the first pattern that its block and name match.

    Args:
        config: resolved.
        repeat: number of the block.
        name: of the matrix in it.
        of_blocks: shares of blocks, from `owl_shares`; None: there are none.
    """
    if of_blocks is not None:
        return replace(config, sparsity=of_blocks[repeat])
    given = config.shares if isinstance(config.shares, Mapping) else {}
    return next(
        (
            replace(config, sparsity=share)
            for pattern, share in given.items()
            if fnmatch.fnmatchcase(f"{repeat}/{name}", pattern)
        ),
        config,
    )


def owl_shares(
    walk: BlockWalk, blocks: PyTree, calibration: Calibration, sparsity: float, tell: Callable[[int], None]
) -> list[float]:
    """Shares of blocks whose mean is `sparsity`: less in blocks with more outliers.

    A weight's size times that of its input is an outlier where it is 5 times the mean of its block's; the block with
    most of them keeps .16 more than that with fewest (OWL: Yin et al. 2024, arXiv:2310.05175, section 3.2).

    Args:
        walk: over the model as it is.
        blocks: its parameters, in host memory.
        calibration: at the start.
        sparsity: share over all blocks.
        tell: is told how many blocks are done.
    """
    outliers, whole = [], replace(walk, sequential=False)
    for repeat in range(walk.stack.repeats):
        tell(repeat)
        scores: list[Array] = []

        def visit(name: str, w: Array, hessian: Array | None, scores: list[Array] = scores) -> tuple[Any, Array]:
            assert hessian is not None, "OWL needs inputs"
            scores.append(_scores(w, hessian))
            return w, w

        block = jax.tree.map(lambda leaf, repeat=repeat: np.asarray(leaf[repeat]), blocks)
        _, after = whole.visit(block, repeat, calibration, visit)
        assert after is not None, "what is calibrated stays so"
        calibration = after
        outliers.append(_share_of_outliers(scores))
    return spread(np.asarray(outliers), sparsity).tolist()


def spread(outliers: Float[np.ndarray, " blocks"], sparsity: float) -> Float[np.ndarray, " blocks"]:
    """Shares of zeros by shares of outliers."""
    reach = np.ptp(outliers)
    if not reach:
        return np.full(len(outliers), sparsity)
    kept = 2 * min(_SPREAD, sparsity / 2, (1 - sparsity) / 2) * (outliers - outliers.min()) / reach
    return sparsity - (kept - kept.mean())


@jax.jit
def _scores(w: Array, hessian: Array) -> Array:
    inputs = jnp.sqrt(jnp.diagonal(hessian, axis1=-2, axis2=-1))
    return (jnp.abs(w.astype(jnp.float32)) * inputs[..., None]).reshape(-1)


def _share_of_outliers(scores: Sequence[Array]) -> float:
    total = sum(len(own) for own in scores)
    mean = sum(float(own.sum()) for own in scores) / total
    return sum(int((own > _OUTLIER * mean).sum()) for own in scores) / total
