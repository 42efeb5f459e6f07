"""An adapter put into the weights that it lies beside."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from cramjax.errors import ModelError
from cramjax.formats.peft import read_adapter
from cramjax.formats.table import flatten
from cramjax.kernels.packed import Packed, is_packed, merge
from cramjax.language_model import LanguageModel
from cramjax.training.given import Given, language_model


@dataclass(frozen=True)
class Merged:
    """A model with its adapter in its weights."""

    model: LanguageModel
    costs: Mapping[str, float]
    """What rounding cost, by the path of each matrix that had an adapter and is packed: the length of the difference to
    the exact sum, as a share of that (Frobenius)."""

    def __str__(self) -> str:
        worst = max(self.costs, key=self.costs.__getitem__, default=None)
        said = f"{self.model.path}: merged"
        if worst is None:
            return said
        return (
            f"{said}; packing {len(self.costs)} matrices again changed them by up to {self.costs[worst]:.2%} ({worst})"
        )


def merge_model(given: Given, out: str | Path, *, adapter: str | Path | None = None) -> Merged:
    """Make a model directory of a model with its adapter in its weights.

    Args:
        given: a run or a model, or the path of one.
        out: the model directory to make.
        adapter: a directory of peft's, to be merged. Default: the adapter that the model has.

    Raises:
        UserError: there is no adapter, or it is of another model; the directory exists.
    """
    model = language_model(given)
    params = model.params if adapter is None else read_adapter(adapter, model)
    if not any(isinstance(leaf, Packed) and leaf.trained for leaf in jax.tree.leaves(params, is_leaf=is_packed)):
        raise ModelError(f"{model.path} has no adapter to merge: give a run of `cramjax tune`, or --adapter DIR.")
    made = merge(params)
    origin = {**model.origin, "merged": str(adapter or model.path)}
    merged = replace(model, model=replace(model.model, adapter=None), params=made.params, origin=origin)
    packed = [path for path, leaf in flatten(made.params) if is_packed(leaf)]
    costs = {path: made.changes[path] for path in packed if path in made.changes}
    return Merged(replace(merged, path=merged.save(out)), costs)
