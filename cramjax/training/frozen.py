"""What of a model is not trained: parameters that lie beside the trained ones in the state, and change no more.

Both are trees of the model's structure with nothing (None) in the other's places, so gradients and optimizers see the
trained ones alone, and the model both.
"""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from cramjax.errors import ConfigError
from cramjax.kernels.packed import Packed, is_packed
from cramjax.optim.groups import path_name


def split(params: PyTree, patterns: Sequence[str]) -> tuple[PyTree, PyTree]:
    """Parameters that are trained, and those that are not: packed ones, and those whose path matches a pattern.

    Args:
        params: all parameters.
        patterns: as of `TrainConfig.freeze`.

    Returns:
        The two; in the place of the second an empty tuple, if all are trained.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to be trained.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)
    paths = [path_name(path) for path, _ in leaves]
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise ConfigError(
                f"train.freeze: no parameter's path matches {pattern!r}. `*` stands for anything; the paths are "
                f"{', '.join(paths)}."
            )
    frozen = [
        isinstance(leaf, Packed) or any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
        for path, (_, leaf) in zip(paths, leaves, strict=True)
    ]
    if not any(frozen):
        return params, ()
    if all(frozen):
        raise ConfigError(
            f"train.freeze={list(patterns)} leaves no parameter to be trained: leave some of these out: "
            f"{', '.join(paths)}."
        )

    def those(chosen: bool) -> PyTree:
        pairs = zip(frozen, leaves, strict=True)
        return structure.unflatten([leaf if is_frozen == chosen else None for is_frozen, (_, leaf) in pairs])

    return those(False), those(True)


def merged(params: PyTree, frozen: PyTree) -> PyTree:
    """All parameters of a model, from what `split` gave.

    Args:
        params: those that are trained.
        frozen: those that are not; an empty tuple: there are none.
    """
    if frozen == ():
        return params

    def either(trained: Any, other: Any) -> Any:
        return other if trained is None else trained

    return jax.tree.map(either, params, frozen, is_leaf=lambda leaf: leaf is None)
