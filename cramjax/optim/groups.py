"""Parameter groups: what the configuration says about the role that a parameter was declared with.

The optimizer reads per-leaf rates and decays from here and knows nothing of names.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cramjax.config import OptimConfig
from cramjax.model.weights import Role


def path_name(path: tuple[Any, ...]) -> str:
    """The keys of a pytree path joined by `/`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


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
    if role == "balance":
        return 1.0  # its steps are what its declaration says
    own = {"embedding": config.embed_lr, "head": config.head_lr, "matrix": None}.get(role, config.scalar_lr)
    return (config.lr if own is None else own) / _ratio(config, role, width_ratio)


def weight_decay(config: OptimConfig, role: Role, width_ratio: float = 1.0) -> float:
    """Decoupled decay of a role, a multiple of the current rate: 0 for norms, biases, scalars and routers.

    Under µP it grows as the rate falls, so that rate · decay, the reciprocal of the steps that weights remember, stays
    (Wang & Aitchison 2024, arXiv:2405.13698, section 4). Arguments as of `peak_rate`.
    """
    if role in ("norm", "bias", "scalar", "router", "balance"):
        return 0.0
    if role == "embedding" and config.embed_weight_decay is not None:
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
