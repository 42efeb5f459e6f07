"""Non-linearities as they are defined, in float32."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cramjax.config import GATED, Activation


def activate(activation: Activation, h: Float[Array, "*batch up"]) -> Float[Array, "*batch mlp"]:
    """Apply a non-linearity; JAX takes the derivative."""
    gate, x = h.astype(jnp.float32), None
    if activation in GATED:
        gate, x = jnp.split(gate, 2, axis=-1)
    match activation:
        case "geglu" | "gelu":
            y = jax.nn.gelu(gate, approximate=False)
        case "swiglu":
            y = jax.nn.silu(gate)
        case "gelu_tanh" | "geglu_tanh":
            # (1 + tanh(u)) / 2 is the logistic function of 2u, which costs XLA's CPU backend a third of the tanh.
            y = gate * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * gate * (1 + 0.044715 * jnp.square(gate)))
        case "relu2":
            y = jnp.square(jax.nn.relu(gate))
    return (y if x is None else y * x).astype(h.dtype)
