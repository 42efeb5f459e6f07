"""Schedules: the learning rate and the batch size as functions of the spent fraction of the budget.

The clock is the only input. Learning-rate multipliers are traceable, so the fraction enters a jitted step as an array
and never recompiles it; the batch size is decided on the host, before a step is dispatched.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from cramjax.config import BatchConfig, OptimConfig
from cramjax.errors import ConfigError
from cramjax.validation import check_optimizer

Fraction = float | Float[Array, ""]
Schedule = Callable[[Fraction], Float[Array, ""]]


def schedule(config: OptimConfig) -> Schedule:
    """The learning-rate multiplier that `config.schedule` names.

    - `triangle`: min(0.25 + x, 4·(1 − x)), Cramming's (Geiping & Goldstein 2022): from a quarter up to the peak at
      x = 0.75, then down.
    - `one_cycle`: up from 0 to the peak at `warmup`, then straight down (Smith & Topin 2017).
    - `cosine`: warm-up, then half a cosine (Loshchilov & Hutter 2016).
    - `wsd`: warm-up, the peak, then straight down over the last `decay` of the budget (Hu et al. 2024).
    - `constant`: warm-up, then the peak to the end; `final_lr` has no say.

    All but `constant` are exactly `final_lr` at x = 1 and stay there.

    Args:
        config: `schedule`, `warmup`, `decay` and `final_lr` are read.

    Returns:
        A function from the spent fraction to the multiplier of every group's peak rate, in [0, 1].

    Raises:
        ConfigError: A fraction outside [0, 1], a `wsd` without decay, or one whose warm-up and decay overlap.
    """
    check_optimizer(config)
    shape = _SHAPES[config.schedule]

    def multiplier(fraction: Fraction) -> Float[Array, ""]:
        return shape(config, jnp.clip(jnp.asarray(fraction, jnp.float32), 0.0, 1.0))

    return multiplier


def batch_size_at(config: BatchConfig, fraction: float) -> int:
    """Sequences in the step that starts at a spent fraction.

    The batch grows linearly from one microbatch to `size` at `ramp`, in whole microbatches, rounded down: it is `size`
    from `ramp` on, not before.

    Args:
        config: `size`, `microbatch` and `ramp` are read.
        fraction: Spent fraction of the budget, in [0, 1].

    Returns:
        A multiple of the microbatch, between one microbatch and `size`.

    Raises:
        ConfigError: `size` is not a multiple of `microbatch`, or there is a ramp and nothing to grow from.
    """
    microbatch = config.size if config.microbatch is None else config.microbatch
    if config.size < 1 or microbatch < 1 or config.size % microbatch:
        raise ConfigError(
            f"batch.size must be a positive multiple of batch.microbatch, got size {config.size} and "
            f"microbatch {microbatch}; {_nearest_multiples(config.size, microbatch)}"
        )
    if not 0 <= config.ramp <= 1:
        raise ConfigError(f"batch.ramp must be a spent fraction in [0, 1], got {config.ramp}")
    if config.ramp and microbatch == config.size:
        raise ConfigError(
            f"batch.ramp={config.ramp} has nothing to grow: the batch is a single microbatch of {microbatch}. "
            "Set batch.microbatch below batch.size, or batch.ramp to 0"
        )
    if fraction >= config.ramp:
        return config.size
    grown = microbatch + (config.size - microbatch) * max(fraction, 0.0) / config.ramp
    return int(grown // microbatch) * microbatch


def _triangle(config: OptimConfig, x: Array) -> Array:
    return jnp.minimum(0.25 + x, _fall(config, 4.0 * (1.0 - x)))


def _one_cycle(config: OptimConfig, x: Array) -> Array:
    return jnp.minimum(_warmup(config, x), _fall(config, (1.0 - x) / (1.0 - config.warmup)))


def _cosine(config: OptimConfig, x: Array) -> Array:
    progress = jnp.clip((x - config.warmup) / (1.0 - config.warmup), 0.0, 1.0)
    return jnp.minimum(_warmup(config, x), _fall(config, 0.5 * (1.0 + jnp.cos(jnp.pi * progress))))


def _wsd(config: OptimConfig, x: Array) -> Array:
    return jnp.minimum(_warmup(config, x), _fall(config, (1.0 - x) / config.decay))


def _warmup(config: OptimConfig, x: Array) -> Array:
    return jnp.minimum(x / config.warmup, 1.0) if config.warmup else jnp.ones_like(x)


def _fall(config: OptimConfig, remaining: Array) -> Array:
    """From 1 down to the final rate as `remaining` goes from 1 (or more) to 0."""
    return config.final_lr + (1.0 - config.final_lr) * jnp.minimum(remaining, 1.0)


_SHAPES: dict[str, Callable[[OptimConfig, Array], Array]] = {
    "triangle": _triangle,
    "one_cycle": _one_cycle,
    "cosine": _cosine,
    "wsd": _wsd,
    "constant": _warmup,
}


def _nearest_multiples(size: int, microbatch: int) -> str:
    if microbatch < 1:
        return "batch.microbatch must be at least 1"
    below = max(size // microbatch, 1) * microbatch
    return f"the nearest sizes are {below} and {below + microbatch}"
