"""Non-linearities by XLA, with a backward pass that starts from what they read."""

import functools

import jax
from jaxtyping import Array, Float

from cramjax import devices
from cramjax.config import Activation
from cramjax.kernels.activation import reference


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(activation: Activation, h: Float[Array, "*batch up"]) -> Float[Array, "*batch mlp"]:
    """Apply a non-linearity."""
    return reference.activate(activation, h)


def _forward(activation: Activation, h: Array) -> tuple[Array, Array]:
    return reference.activate(activation, h), h


def _backward(activation: Activation, h: Array, g: Array) -> tuple[Array]:
    if devices.target().platform != "cpu":
        # XLA would find the forward pass's float32 values here, and keep them instead: faster, for memory to spare.
        h = jax.lax.optimization_barrier(h)
    return jax.vjp(functools.partial(reference.activate, activation), h)[1](g)  # pyright: ignore[reportReturnType]


activate.defvjp(_forward, _backward)
