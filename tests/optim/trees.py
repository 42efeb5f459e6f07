"""A small parameter tree with every role, flat by path or nested as the model nests it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SHAPES: dict[str, tuple[int, ...]] = {
    "embed/token/table": (11, 8),
    "embed/position/scale": (),
    "blocks/attention_norm/weight": (3, 8),
    "blocks/attention/qkv/kernel": (3, 8, 16),
    "blocks/attention/qkv/bias": (3, 16),
    "blocks/mlp/down/kernel": (3, 20, 8),
    "head/norm/weight": (8,),
    "head/decoder/kernel": (8, 11),
}
ROLE = {
    "embed/token/table": "embed",
    "embed/position/scale": "scalar",
    "blocks/attention_norm/weight": "scalar",
    "blocks/attention/qkv/kernel": "matrix",
    "blocks/attention/qkv/bias": "scalar",
    "blocks/mlp/down/kernel": "matrix",
    "head/norm/weight": "scalar",
    "head/decoder/kernel": "head",
}


def random_flat(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: np.asarray(rng.standard_normal(shape), np.float32) for path, shape in shapes.items()}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
    return tree


def flatten(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(tree)}
