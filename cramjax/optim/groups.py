"""Parameter groups: which role a parameter plays, from its path, and what the configuration says about that role.

Every leaf of the parameter tree is an embedding, the head, a matrix or a scalar. The optimizer reads per-leaf rates
and decays from here and knows nothing of names.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from cramjax.config import OptimConfig

Role = Literal["embed", "head", "matrix", "scalar"]


def role(path: str) -> Role:
    """The role of the parameter at a path such as `blocks/attention/out/kernel`.

    Tables are embeddings, the decoders' kernels are the head, other kernels are matrices, and norms, biases, gates and
    scales are scalars, whatever their shape.
    """
    name = path.rsplit("/", 1)[-1]
    if name == "table":
        return "embed"
    if re.fullmatch(r"head/(tail\d+/)?decoder/kernel", path):
        return "head"
    return "matrix" if name == "kernel" else "scalar"


def path_name(path: tuple[Any, ...]) -> str:
    """The keys of a pytree path joined by `/`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(f: Callable[[str], Any], tree: PyTree) -> PyTree:
    """A tree of the same structure whose leaves are `f(path)`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: f(path_name(path)), tree)


def peak_rate(config: OptimConfig, role: Role, width_ratio: float = 1.0) -> float:
    """Peak learning rate of a role: its own where one is set, else `lr`; under µP, that of matrices falls with width.

    Args:
        config: rates as they were tuned at the base width.
        role: of the parameter.
        width_ratio: width over µP's base width. Optimizers whose steps have a fixed size per entry divide the rate of
            hidden matrices by it, and leave embeddings, head, norms and biases alone (Yang et al. 2022,
            arXiv:2203.03466, table 8; for any entry-wise optimizer Yang & Littwin 2023, arXiv:2308.01814). Muon's
            step has spectral norm max(1, out / in)^½, which does not change with width: the condition that µP is
            equivalent to, so its rate holds as it is (Yang, Simon & Bernstein 2023, arXiv:2310.17813).
    """
    own = {"embed": config.embed_lr, "head": config.head_lr, "matrix": None, "scalar": config.scalar_lr}[role]
    return (config.lr if own is None else own) / _ratio(config, role, width_ratio)


def weight_decay(config: OptimConfig, role: Role, width_ratio: float = 1.0) -> float:
    """Decoupled decay of a role, a multiple of the current rate: 0 for norms, biases and scalars.

    Under µP it grows as the rate falls, so that rate · decay, the reciprocal of the steps that weights remember, stays
    (Wang & Aitchison 2024, arXiv:2405.13698, section 4). Arguments as of `peak_rate`.
    """
    if role == "scalar":
        return 0.0
    if role == "embed" and config.embed_weight_decay is not None:
        return config.embed_weight_decay
    return config.weight_decay * _ratio(config, role, width_ratio)


def _ratio(config: OptimConfig, role: Role, width_ratio: float) -> float:
    """What µP divides the rate of a role by, and multiplies its decay with."""
    return width_ratio if role == "matrix" and not config.traits.spectral else 1.0


def with_decay(direction: Array, param: Array, decay: float, *, cautious: bool) -> Array:
    """The direction of a parameter with its decoupled decay; cautiously, only where the direction shrinks it already.

    Cautious weight decay: Chen et al. 2025, arXiv:2510.12402.
    """
    if not decay:
        return direction
    return direction + decay * (jnp.where(direction * param >= 0, param, 0.0) if cautious else param)
