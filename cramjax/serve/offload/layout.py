"""A stored model cut into stages: what a walk holds at once. A stage is a block, or the head; each has leaves, which
are placed and moved whole.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cramjax.errors import ConfigError
from cramjax.formats.table import flatten
from cramjax.kernels.packed import Packed, from_arrays, quantisation_refusal, quantise, to_arrays
from cramjax.language_model.directory import StoredModel
from cramjax.model import Weight
from cramjax.serve.offload.store import aligned

TABLE = "embed/token/table"
_GROUP = 64
"""Inputs that share a scale, where weights are rounded to codes."""
_SMALL = 64 << 10
"""Bytes of a leaf that always is on the device."""

Held = str | int | None
"""How a leaf is held: in a precision, in so many bits, or (None) as it is stored."""


@dataclass(frozen=True)
class Leaf:
    """A parameter of a stage."""

    path: str
    """Among all parameters."""
    repeat: int | None
    """Which of the stacked ones; None: it is not stacked."""
    held: Held
    shape: PyTree
    """Shapes of its arrays as it is held: an array's, or those of a packed leaf."""

    @property
    def bytes(self) -> int:
        """Of its arrays, each aligned."""
        return sum(aligned(math.prod(x.shape) * x.dtype.itemsize) for x in jax.tree.leaves(self.shape))

    @property
    def small(self) -> bool:
        """Whether moving it does not pay."""
        return self.bytes < _SMALL


@dataclass(frozen=True)
class Stage:
    """What a walk needs of the parameters at one point."""

    name: str
    leaves: tuple[Leaf, ...]
    place: int = 0
    """Of a block in its period."""
    repeat: int = 0

    @property
    def bytes(self) -> int:
        """Of all leaves."""
        return sum(leaf.bytes for leaf in self.leaves)


@dataclass(frozen=True)
class Layout:
    """A model's stages in the order of a walk: what the embedding reads beside its table, the blocks, the head."""

    embed: Stage
    blocks: tuple[Stage, ...]
    head: Stage
    table: Leaf | None
    """The embedding's table, of which rows are looked up where it lies; None: it is the head's."""

    @property
    def walked(self) -> tuple[Stage, ...]:
        """The stages whose leaves may come and go."""
        return (*self.blocks, self.head)

    @property
    def bytes(self) -> int:
        """Of everything, as it is held."""
        return self.embed.bytes + sum(s.bytes for s in self.walked) + (0 if self.table is None else self.table.bytes)


def layout_of(stored: StoredModel, weights: str) -> Layout:
    """The stages of a stored model.

    Args:
        stored: the model.
        weights: how they are to be held: `auto` (the precision that the model computes in), `float32`, `bfloat16`,
            `int8` or `int4`.

    Raises:
        ConfigError: a matrix cannot be rounded so.
    """
    model = stored.model.model
    precision = model.compute_dtype if weights == "auto" else weights
    declared = dict(flatten(model.weights))
    leaves = dict(flatten(stored.model.params))
    rows = model.config.tied, bool(model.sizes.tails)

    def leaf(path: str, repeat: int | None) -> Leaf:
        own = leaves[path] if repeat is None else jax.tree.map(_one, leaves[path])
        held = _held(path, declared[path], own, precision, *rows)
        shape = jax.eval_shape(partial(hold, held), own)
        return Leaf(path, repeat, held, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shape))

    def stage(name: str, prefix: str, place: int = 0, repeat: int | None = None) -> Stage:
        own = [path for path in leaves if path.startswith(prefix) and path != TABLE]
        return Stage(name, tuple(leaf(path, repeat) for path in own), place, repeat or 0)

    places = len(model.period)
    blocks = tuple(
        stage(f"block {number}", f"blocks/{number % places}/" if places > 1 else "blocks/", number % places, repeat)
        for number in range(model.config.layers)
        for repeat in [number // places]
    )
    embed, head, table = stage("embedding", "embed/"), stage("head", "head/"), leaf(TABLE, None)
    if model.config.tied:
        return Layout(embed, blocks, Stage("head", (*head.leaves, table)), None)
    return Layout(embed, blocks, head, table)


def _one(stacked: Any) -> Any:
    return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype)


def _held(path: str, weight: Weight, leaf: Any, precision: str, tied: bool, tails: bool) -> Held:
    is_head = weight.role == "head" and not tails
    is_table = path == TABLE and tied and not tails
    if isinstance(leaf, Packed) or not (weight.role == "matrix" or is_head or is_table):
        return None
    if precision not in ("int8", "int4"):
        return None if leaf.dtype == jnp.dtype(precision) else precision
    if is_table:
        return None
    bits = 4 if precision == "int4" and not is_head else 8
    if why := quantisation_refusal(leaf.shape, bits, math.gcd(leaf.shape[-2], _GROUP)):
        raise ConfigError(f"{path}: {why}")
    return bits


def hold(held: Held, leaf: Any) -> Any:
    """A leaf as it is to be held.

    Codes have a scale and a zero for 64 inputs, both in bfloat16: 4.5 bits a weight, as the paper's.

    Args:
        held: how.
        leaf: as it is stored.
    """
    if held is None:
        return leaf
    if isinstance(held, str):
        return leaf.astype(held)
    return quantise(
        jnp.asarray(leaf), held, math.gcd(leaf.shape[-2], _GROUP), symmetric=False, scale_dtype=jnp.bfloat16
    )


def nested(leaves: Mapping[str, Any]) -> PyTree:
    """The tree of leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        place = tree
        for key in above:
            place = place.setdefault(key, {})
        place[last] = leaf
    return tree


def path_in(stage: Stage, leaf: Leaf, places: int) -> str:
    """The path of a leaf within the parameters that a program of its stage takes."""
    if leaf.repeat is None:
        return leaf.path
    return leaf.path.split("/", 2 if places > 1 else 1)[-1]


def parts_of(stored: StoredModel, leaf: Leaf) -> Iterator[str]:
    """Names of the arrays that a leaf is stored in."""
    own = dict(flatten(stored.model.params))[leaf.path]
    yield from to_arrays({leaf.path: own})


def joined(stored: StoredModel, leaf: Leaf, arrays: Mapping[str, np.ndarray]) -> Any:
    """A leaf of its stored arrays."""
    settings = {name: own for name, own in stored.adapters.items() if name == leaf.path}
    return dict(flatten(from_arrays(arrays, settings)))[leaf.path]


def stage_shapes(stage: Stage, places: int) -> PyTree:
    """Shapes of the parameters that a program of a stage takes."""
    return nested({path_in(stage, leaf, places): leaf.shape for leaf in stage.leaves})
