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
from cramjax.model import Model
from cramjax.optim.groups import path_name


def untrained(model: Model, freeze: Sequence[str]) -> Sequence[str]:
    """Patterns of the paths of all that is not trained, beside what is packed.

    Args:
        model: which may have an adapter; all else is then frozen.
        freeze: as of `TrainConfig.freeze`.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to be trained.
    """
    weights = jax.tree_util.tree_leaves_with_path(model.bare.weights)
    paths = [path_name(path) for path, _ in weights]
    for pattern in freeze:
        if not fnmatch.filter(paths, pattern):
            raise ConfigError(
                f"train.freeze: no parameter's path matches {pattern!r}. `*` stands for anything; the paths are "
                f"{', '.join(paths)}."
            )
    if model.adapter is not None:
        biases = model.adapter.kind == "bitfit"
        own = {path: weight for path, (_, weight) in zip(paths, weights, strict=True) if not weight.always_trained}
        freeze = [path for path, weight in own.items() if not biases or weight.role != "bias"]
        if biases and len(freeze) == len(own):
            raise ConfigError("adapter.kind is bitfit, and the model has no biases to train: choose lora or ia3.")
    elif all(any(fnmatch.fnmatchcase(path, pattern) for pattern in freeze) for path in paths):
        raise ConfigError(
            f"train.freeze={list(freeze)} leaves no parameter to be trained: leave some of these out: "
            f"{', '.join(paths)}."
        )
    return tuple(freeze)


def split(params: PyTree, patterns: Sequence[str]) -> tuple[PyTree, PyTree]:
    """Parameters that are trained, and those that are not.

    Of packed ones, those parts are trained that are made for it: an adapter's. Of others, those whose path matches no
    pattern.

    Args:
        params: all parameters, or their declarations.
        patterns: from `untrained`.

    Returns:
        The two; in the place of the second an empty tuple, if all are trained.
    """

    def part(trained: bool) -> PyTree:
        def own(path: Any, leaf: Any) -> Any:
            if isinstance(leaf, Packed):
                return leaf.only(leaf.trained) if trained else leaf.only(leaf.constant)
            frozen = any(fnmatch.fnmatchcase(path_name(path), pattern) for pattern in patterns)
            return None if frozen == trained else leaf

        return jax.tree_util.tree_map_with_path(own, params, is_leaf=is_packed)

    frozen = part(trained=False)
    return (part(trained=True), frozen) if jax.tree.leaves(frozen) else (params, ())


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
