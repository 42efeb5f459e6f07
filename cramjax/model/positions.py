"""Where tokens stand: rotary angles and their scaling, sinusoids, and the hash of a token and the one before it."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cramjax.config import RopeScaling


def rotary_angles(
    positions: Int[Array, "rows seq"], head_dim: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "rows seq 1 half"], Float[Array, "rows seq 1 half"]]:
    """Cosines and sines of RoPE for each position (Su et al. 2021, eq. 15, with paired halves as Llama has them).

    Args:
        positions: of the tokens (rows, seq).
        head_dim: width of a head.
        base: of the frequencies.
        scaling: of the frequencies; yarn's multiplies cosines and sines too. None: none.
    """
    frequencies = jnp.asarray(rotary_frequencies(head_dim, base, scaling), jnp.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    if scaling is None or scaling.kind != "yarn":
        return jnp.cos(angles), jnp.sin(angles)
    factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def rotary_frequencies(head_dim: int, base: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians that each pair of a head turns by from one position to the next, in float64 (head_dim / 2,).

    Args:
        head_dim: width of a head.
        base: the slowest frequency is about its reciprocal.
        scaling: see `RopeScaling`. Formulas: of `llama3` as Llama 3.1's code has them, of `yarn` Peng et al. 2023,
            section 3.2.
    """
    plain = base ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    original = scaling.original_positions
    if scaling.kind == "llama3":
        turns = original * plain / (2 * math.pi)
        kept = np.clip((turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor), 0.0, 1.0)
    else:

        def turning(turns: float) -> float:
            """Place of the frequency that turns so often within the original positions."""
            return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = turning(scaling.beta_fast), turning(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        kept = 1.0 - np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return plain * (kept + (1.0 - kept) / scaling.factor)


def sinusoids(rows: int, width: int) -> np.ndarray:
    """Sines in even and cosines in odd columns (Vaswani et al. 2017, section 3.5)."""
    angles = np.arange(rows)[:, None] * np.exp(np.arange(0, width, 2) * (-math.log(10_000.0) / width))
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(rows, width).astype(np.float32)


def bigram_buckets(
    tokens: Int[Array, "batch seq"],
    previous: Int[Array, " batch"] | None,
    buckets: int,
    positions: Int[Array, "rows seq"] | None = None,
) -> Int[Array, "batch seq"]:
    """Bucket of each (previous token, token): a hash into 1 … buckets - 1, or 0 where there is no previous token, as at
    position 0.
    """
    start = jnp.full(tokens.shape[:1], -1, tokens.dtype) if previous is None else previous
    before = jnp.concatenate([start[:, None], tokens[:, :-1]], axis=1)
    mixed = (before.astype(jnp.uint32) * jnp.uint32(2654435761)) ^ (tokens.astype(jnp.uint32) * jnp.uint32(2246822519))
    mixed = (mixed ^ (mixed >> 15)) % jnp.uint32(max(buckets - 1, 1))
    nothing = before < 0 if positions is None else (before < 0) | (positions == 0)
    return jnp.where(nothing, 0, jnp.minimum(mixed + 1, buckets - 1).astype(jnp.int32))
