"""LOMO and AdaLomo: updates of one tensor at a time, for gradients that are used as soon as they exist.

The walk that finds the gradients is `cramjax.training.walk`; here is what one of them does to its tensor. LOMO is
gradient descent (Lv et al. 2023, arXiv:2306.09782). AdaLomo adds a factored second moment, clips each tensor's update
and makes its step relative to the tensor's size (Lv et al. 2023, arXiv:2310.10195, algorithm 1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from cramjax.config import OptimConfig
from cramjax.errors import ConfigError
from cramjax.optim.groups import peak_rate, weight_decay, with_decay
from cramjax.optim.optimizer import OptimizerState
from cramjax.optim.schedule import Fraction, schedule
from cramjax.optimizers import names_of

Part = Literal["embed", "blocks", "head"]
Moment = dict[str, Float[Array, "..."]]
"""A second moment: `row` and `column` means of a matrix, or `full` of anything smaller; empty for LOMO."""

_DECAY_EXPONENT = 0.8
_SQUARE_EPS = 1e-30
_LEAST_SCALE = 1e-3


@dataclass(frozen=True)
class FusedOptimizer:
    """Pure functions that update one tensor at a time."""

    init: Callable[[PyTree], OptimizerState]
    """`(params) -> state`, whose `transform` has a tree of second moments for each part, stacked for the blocks."""
    update: Callable[[Part, int, Array, Moment, Array, "When"], tuple[Array, Moment]]
    """`(part, place, gradient, moment, param, when) -> (param, moment)`: of a tensor by its place among the leaves of
    its part, without the layer axis."""
    clip: float | None
    """Limit of the global norm of the gradient; None: the norm need not be known before the updates."""
    rate: Callable[[Fraction], Float[Array, ""]]
    """Learning rate of the matrices at a spent fraction."""

    def evaluation_params(self, params: PyTree, state: OptimizerState) -> PyTree:
        """The parameters to evaluate with: they themselves."""
        del state
        return params


@dataclass(frozen=True)
class When:
    """What an update depends on beside its tensor."""

    step: Int[Array, ""]
    """Steps before this one."""
    fraction: Float[Array, ""]
    """Spent fraction of the budget."""
    factor: Float[Array, ""] | float
    """What gradients are multiplied with, to bound their global norm."""
    key: Any
    """Random key of this step and layer, for stochastic rounding."""


def make_fused(config: OptimConfig, weights: PyTree) -> FusedOptimizer:
    """LOMO or AdaLomo, for a tree of parameters.

    A step is p ← p − rate · (direction + decay · p), as of the other optimizers: the rate is the group's peak times the
    schedule's multiplier. Each layer's tensor is a tensor of its own; so is each matrix of an array with more axes.
    Parameters below float32 are updated in float32 and rounded stochastically.

    Args:
        config: which of the two, groups, schedule and clipping.
        weights: the parameters' declarations (`Model.weights`), whose roles decide the groups (`cramjax.optim.groups`).

    Raises:
        ConfigError: another optimizer, or an average of weights.
    """
    if not config.traits.layerwise:
        names = " or ".join(names_of("layerwise"))
        raise ConfigError(f"optim.name must be {names} to update layer by layer, got {config.name}.")
    adaptive = config.traits.factored
    multiplier_at = schedule(config)  # which checks the configuration
    rates, decays = (
        {part: [of(config, weight) for weight in jax.tree.leaves(tree)] for part, tree in weights.items()}
        for of in (
            lambda config, weight: weight.rate * peak_rate(config, weight.role),
            lambda config, weight: weight_decay(config, weight.role),
        )
    )

    roles = {part: [weight.role for weight in jax.tree.leaves(tree)] for part, tree in weights.items()}

    def init(params: PyTree) -> OptimizerState:
        def moments(tree: PyTree) -> PyTree:
            return jax.tree.map(initial_moment if adaptive else lambda p: {}, tree)

        stacked = jax.vmap(moments)(params["blocks"]) if adaptive else moments(params["blocks"])
        return OptimizerState({name: moments(params[name]) for name in ("embed", "head")} | {"blocks": stacked}, ())

    def update(
        part: Part, place: int, gradient: Array, moment: Moment, param: Array, when: When
    ) -> tuple[Array, Moment]:
        if adaptive:
            direction, moment = adalomo_direction(param, gradient, moment, when.step, clip=config.clip)
        else:
            direction = when.factor * gradient
        if roles[part][place] == "balance":
            direction = jnp.sign(gradient)
        weight = param.astype(jnp.float32)
        direction = with_decay(direction, weight, decays[part][place], cautious=config.cautious_decay)
        weight = weight - (multiplier_at(when.fraction) * rates[part][place]) * direction
        return rounded(weight, param.dtype, jax.random.fold_in(when.key, place)), moment

    return FusedOptimizer(
        init, update, None if adaptive else config.clip, lambda fraction: multiplier_at(fraction) * config.lr
    )


def initial_moment(param: Float[Array, "..."]) -> Moment:
    """The second moment before the first step: factored over the last two axes, if there are two."""
    if param.ndim < 2:
        return {"full": jnp.zeros(param.shape, jnp.float32)}
    *leading, rows, columns = param.shape
    return {"row": jnp.zeros((*leading, rows), jnp.float32), "column": jnp.zeros((*leading, columns), jnp.float32)}


def adalomo_direction(
    param: Float[Array, "..."],
    gradient: Float[Array, "..."],
    moment: Moment,
    step: Int[Array, ""],
    *,
    clip: float | None = 1.0,
) -> tuple[Float[Array, "..."], Moment]:
    """The unit-rate direction of a tensor (AdaLomo, algorithm 1, lines 8–12), and its new second moment.

    Args:
        param: the tensor; matrices along leading axes are tensors of their own.
        gradient: float32, of the same shape.
        moment: from `initial_moment` or the last step.
        step: steps before this one.
        clip: limit of the root mean square of the direction before it is made relative; None: none.

    Returns:
        max(1e-3, rms of the tensor) times the clipped, normalised gradient; and the second moment.
    """
    axes = tuple(range(-min(param.ndim, 2), 0))
    beta = 1.0 - (step + 1).astype(jnp.float32) ** -_DECAY_EXPONENT
    square = jnp.square(gradient) + _SQUARE_EPS

    def moved(name: str, value: Array) -> Array:
        return beta * moment[name] + (1.0 - beta) * value

    if param.ndim < 2:
        moment = {"full": moved("full", square)}
        scale = jax.lax.rsqrt(moment["full"])
    else:
        moment = {"row": moved("row", jnp.mean(square, -1)), "column": moved("column", jnp.mean(square, -2))}
        row = moment["row"] / jnp.mean(moment["row"], -1, keepdims=True)
        scale = jax.lax.rsqrt(row)[..., :, None] * jax.lax.rsqrt(moment["column"])[..., None, :]
    direction = gradient * scale
    if clip is not None:
        direction = direction / jnp.maximum(1.0, _rms(direction, axes) / clip)
    return direction * jnp.maximum(_LEAST_SCALE, _rms(param.astype(jnp.float32), axes)), moment


def rounded(x: Float[Array, "..."], dtype: Any, key: Any) -> Float[Array, "..."]:
    """A float32 array in another precision; to bfloat16 stochastically, so that its expectation is the array.

    Updates below half a unit in the last place would be lost by rounding to nearest. What bfloat16 represents stays as
    it is, and so does what is not finite.

    Args:
        x: float32.
        dtype: bfloat16 or float32.
        key: a random key.
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    # bfloat16 is the upper half of float32: noise below its last bit carries into it as often as what is cut off says.
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(cut, jnp.float32), x).astype(dtype)


def _rms(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axes, keepdims=True))
