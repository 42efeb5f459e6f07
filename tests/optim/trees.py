"""A small parameter tree with every role, flat by path or nested as the model nests it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cramjax.model import Weight
from cramjax.model.weights import Constant, Role

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
ROLE: dict[str, Role] = {
    "embed/token/table": "embedding",
    "embed/position/scale": "scalar",
    "blocks/attention_norm/weight": "scalar",
    "blocks/attention/qkv/kernel": "matrix",
    "blocks/attention/qkv/bias": "scalar",
    "blocks/mlp/down/kernel": "matrix",
    "head/norm/weight": "scalar",
    "head/decoder/kernel": "head",
}


def declared(tree: Any, widths: Mapping[str, tuple[int, ...]] | None = None) -> Any:
    """Declarations of a tree of parameters that are named as the model names them; `widths` of what is fused."""

    def weight(path: str, shape: tuple[int, ...]) -> Weight:
        other: Role = {"kernel": "matrix", "table": "embedding"}.get(path.rsplit("/", 1)[-1], "scalar")
        repeats = shape[0] if path.startswith("blocks/") else None
        own = shape if repeats is None else shape[1:]
        axes = {"matrix": ("embed", "mlp"), "head": ("embed", "vocab"), "embedding": ("vocab", "embed")}
        role = ROLE.get(path, other)
        return Weight(
            own, axes.get(role, ("embed",) * len(own)), role, Constant(0.0), (widths or {}).get(path, ()), repeats
        )

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: weight(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape), tree
    )


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
