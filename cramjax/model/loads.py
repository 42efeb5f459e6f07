"""How busy the experts of a model are on some text."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from cramjax.errors import ConfigError
from cramjax.model.experts import LOAD_UNIT
from cramjax.model.model import Model


def expert_loads(model: Model, params: PyTree, tokens: Int[Array, "batch seq"]) -> Float[Array, "blocks experts"]:
    """Tokens that each expert is sent, over the mean of its block's; for about the price of a forward pass.

    Loads stand in the place of gradients by routers' biases, whatever the loss is.

    Args:
        model: with experts.
        params: all parameters.
        tokens: token ids (batch, seq).

    Raises:
        ConfigError: the model has no experts.
    """
    experts = model.config.experts
    if experts is None:
        raise ConfigError("The model has no experts: train one with model.experts.")
    weights, structure = jax.tree.flatten(model.weights)
    leaves = structure.flatten_up_to(params)
    places = [place for place, weight in enumerate(weights) if weight.role == "balance"]

    def total(biases: list[Any]) -> Array:
        own = dict(zip(places, biases, strict=True))
        held = structure.unflatten([own.get(place, leaf) for place, leaf in enumerate(leaves)])
        return jnp.sum(model.stream(held, tokens).astype(jnp.float32))

    over = jax.grad(total)([leaves[place].astype(jnp.float32) for place in places])
    each = jnp.stack(over, axis=1).reshape(-1, experts.number)  # blocks of a period, within the repeats
    return 1.0 + each / LOAD_UNIT / (tokens.size * experts.active / experts.number)
