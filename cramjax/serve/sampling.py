"""From logits to the next token: temperature, top-k, top-p. Pure functions with static shapes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from cramjax.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep only this many of the likeliest tokens."""
    top_p: float | None = None
    """Keep only the likeliest tokens that together reach this probability (after temperature and `top_k`)."""

    def __post_init__(self):
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 (greedy) or more, got {self.temperature}: 0.8 is a usual value.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be 1 or more, got {self.top_k}: leave it out to keep every token.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                f"top_p must be above 0 and at most 1, got {self.top_p}: leave it out to keep every token."
            )


def sample(logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], sampling: Sampling) -> Int[Array, " batch"]:
    """Draw one token per row.

    Args:
        logits: unnormalised log-probabilities.
        keys: one random key per row, so that a row's draw does not depend on the rows beside it.
        sampling: how to draw; static under jit.
    """
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1)
    return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling))


def filter_logits(logits: Float[Array, "batch vocab"], sampling: Sampling) -> Float[Array, "batch vocab"]:
    """Logits at the temperature, with the tokens that `top_k` and `top_p` exclude at minus infinity.

    Tokens that tie with the last one kept are kept too. The temperature must not be 0.

    Source: top-p is nucleus sampling, Holtzman et al. 2020, section 3.1.
    """
    logits = logits.astype(jnp.float32) / sampling.temperature
    vocab = logits.shape[-1]
    if sampling.top_k is not None and sampling.top_k < vocab:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        descending = jax.lax.top_k(logits, vocab)[0]
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = jnp.maximum(jnp.sum(before < sampling.top_p, axis=-1, keepdims=True), 1)
        last = jnp.take_along_axis(descending, kept - 1, axis=-1)
        logits = jnp.where(logits < last, -jnp.inf, logits)
    return logits
