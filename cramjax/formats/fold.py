"""Rewrites that change a model's form and nothing that it computes: what other classes lack, folded into weights."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from cramjax.config import ModelConfig
from cramjax.formats.family import head_dim
from cramjax.formats.table import flatten, generic_path, unflatten
from cramjax.model import Model, Weight
from cramjax.model.positions import sinusoids


def folded(model: Model, params: PyTree) -> tuple[Model, PyTree] | None:
    """A model without µP's factors and scales of attention, which go into its weights; None where it has none.

    The head's division by the width ratio goes into the norm before it, or into an untied matrix. The scale of
    attention goes into the weights of the queries' norm, which are made if need be, or into the queries' columns.
    """
    config, leaves = model.config, dict(flatten(params))
    sizes = model.sizes
    ratio, scale = sizes.width_ratio, sizes.attention_scale * head_dim(config) ** 0.5
    if ratio == 1 and abs(scale - 1) < 1e-12:
        return None
    changed: dict[str, Any] = {"mup_base_width": None, "mup_base_head_dim": None, "attention_scale": None}
    if ratio != 1:
        changed |= _fold_ratio(model, leaves, ratio)
    if abs(scale - 1) >= 1e-12:
        changed |= _fold_scale(model, leaves, scale)
    rewritten = replace(model, config=replace(config, **changed))
    return rewritten, unflatten(leaves, rewritten.abstract_params())


def _fold_ratio(model: Model, leaves: dict[str, Any], ratio: float) -> dict[str, Any]:
    config = model.config
    last = "head/transform/norm" if config.head_transform else "head/norm" if config.final_norm else None
    if last is not None and config.norm_affine:
        for path in (f"{last}/weight", f"{last}/bias"):
            if path in leaves:
                leaves[path] = leaves[path] / ratio
        return {}
    if config.tied:
        leaves["head/decoder/kernel"] = leaves["embed/token/table"].T / ratio
        return {"tied": False}
    leaves["head/decoder/kernel"] = leaves["head/decoder/kernel"] / ratio
    return {}


def _fold_scale(model: Model, leaves: dict[str, Any], scale: float) -> dict[str, Any]:
    config: ModelConfig = model.config
    width = head_dim(config)
    for path in list(leaves):
        generic, _, _ = generic_path(path, model)
        queries = model.sizes.qkv[0]
        if not generic.startswith("blocks/attention/qkv/"):
            continue
        if config.qk_norm:
            stem = path.removesuffix("/kernel").removesuffix("/bias").removesuffix("/qkv")
            if path.endswith("/kernel"):
                layers = leaves[path].shape[0]
                ones = jnp.ones((layers, width), leaves[path].dtype)
                name = f"{stem}/query_norm/weight"
                leaves[name] = leaves.get(name, ones) * scale
                leaves.setdefault(f"{stem}/key_norm/weight", ones)
        else:
            leaves[path] = leaves[path].at[..., :queries].multiply(scale)
    return {"qk_norm_weight": True} if config.qk_norm else {}


def with_weights_of(params: PyTree, target: Model) -> PyTree:
    """The parameters of a model in the structure of another that computes the same: with the weights of special values
    that the other has and this one does not need, and without the vocabulary's padding.

    Args:
        params: of the model.
        target: the other.
    """
    leaves = dict(flatten(params))
    made = {}
    abstract = target.abstract_params()
    declared = dict(flatten(target.weights))
    for path, like in flatten(abstract):
        if path in leaves:
            made[path] = _cut(declared[path], leaves[path], target.vocab_size)
        else:
            made[path] = _special(path, like, leaves)
    return unflatten(made, abstract)


def _cut(weight: Weight, leaf: Any, vocab_size: int) -> Any:
    shape = weight.real_shape(vocab_size)
    return leaf if shape == leaf.shape else leaf[tuple(slice(0, size) for size in shape)]


def _special(path: str, like: jax.ShapeDtypeStruct, leaves: dict[str, Any]) -> Any:
    if path == "head/decoder/kernel":
        return leaves["embed/token/table"][: like.shape[1]].T
    if path == "embed/position/table":
        rows = jnp.asarray(sinusoids(*like.shape)) * leaves["embed/position/scale"]
        return rows.astype(like.dtype)
    norm = path.endswith("norm/weight")
    return (jnp.ones if norm else jnp.zeros)(like.shape, like.dtype)
