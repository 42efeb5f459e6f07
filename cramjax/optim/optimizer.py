"""Optimizers: optax chains over parameter groups, driven by the spent fraction of the budget.

`make_optimizer` reads top to bottom: clip, direction, decay, rate. Directions come from optax; what optax lacks (rates
per group under one traced multiplier, decay per group, Hutchinson's estimate by reverse mode) is small and below.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, PyTree

from cramjax.config import OptimConfig
from cramjax.errors import ConfigError
from cramjax.optim import directions
from cramjax.optim.directions import Objective, Transform, stateless, transform_of
from cramjax.optim.groups import peak_rate, weight_decay, with_decay
from cramjax.optim.schedule import Fraction, schedule


class OptimizerState(NamedTuple):
    """One pytree of arrays: what a checkpoint keeps and the sharding table matches by path."""

    transform: PyTree
    ema: PyTree
    """The averaged weights; an empty tuple without EMA."""


@dataclass(frozen=True)
class Optimizer:
    """Pure functions that turn gradients into new weights."""

    init: Callable[[PyTree], OptimizerState]
    """`(params) -> state`."""
    update: Callable[..., tuple[PyTree, OptimizerState, dict[str, Float[Array, ""]]]]
    """`(grads, state, params, fraction, objective=None, norm=None) -> (params, state, metrics)`. `fraction` may be
    traced. `objective`, the scalar loss as a function of the parameters, is needed by Sophia alone and differentiated
    every tenth step. `norm` is that of all gradients, where `grads` are only some of them. Metrics: `grad_norm` before
    clipping, `lr` of the matrices."""
    evaluation_params: Callable[[PyTree, OptimizerState], PyTree]
    """`(params, state) -> params` to evaluate with: the averaged weights where the optimizer keeps any."""


def make_optimizer(
    config: OptimConfig,
    weights: PyTree,
    *,
    width_ratio: float = 1.0,
) -> Optimizer:
    """The optimizer that a configuration names, for a tree of parameters.

    A step is p ← p − rate · (direction + decay · p): the rate is the group's peak times the schedule's multiplier, and
    the decay is decoupled. Under schedule-free AdamW the same step moves z, and the parameters are its interpolation.

    Args:
        config: Optimizer, groups, schedule, clipping and averaging.
        weights: The parameters' declarations (`Model.weights`), in their structure: roles decide the groups
            (`cramjax.optim.groups`), and Muon orthogonalises each matrix that is fused with others on its own.
        width_ratio: Width over µP's base width (`cramjax.optim.groups.peak_rate`).

    Returns:
        Pure functions; their state is one pytree of arrays.

    Raises:
        ConfigError: A schedule that cannot be, or an average of weights that schedule-free AdamW already averages.
    """
    if config.traits.layerwise:
        raise ConfigError(f"optim.name={config.name} updates tensors as their gradients come: use make_fused.")
    multiplier_at = schedule(config)  # which checks the configuration
    step = optax.chain(
        directions.levelling(getattr(directions, config.name)(config, weights), weights),
        _decay(jax.tree.map(lambda w: weight_decay(config, w.role, width_ratio), weights), config.cautious_decay),
        _scale_by_rate(jax.tree.map(lambda w: w.rate * peak_rate(config, w.role, width_ratio), weights)),
    )
    transform = optax.chain(
        _clip(math.inf if config.clip is None else config.clip),
        _schedule_free(step, config.beta1) if config.traits.averages else step,
    )

    def init(params: PyTree) -> OptimizerState:
        return OptimizerState(transform.init(params), jax.tree.map(jnp.copy, params) if config.ema else ())

    def update(
        grads: PyTree,
        state: OptimizerState,
        params: PyTree,
        fraction: Fraction,
        objective: Objective | None = None,
        norm: Float[Array, ""] | None = None,
    ) -> tuple[PyTree, OptimizerState, dict[str, Float[Array, ""]]]:
        multiplier = multiplier_at(fraction)
        norm = optax.tree.norm(grads) if norm is None else norm
        updates, inner = transform.update(
            grads, state.transform, params, multiplier=multiplier, norm=norm, objective=objective
        )
        params = optax.apply_updates(params, updates)
        ema = _average(config, state.ema, params, fraction) if config.ema else ()
        metrics = {"grad_norm": norm, "lr": multiplier * peak_rate(config, "matrix", width_ratio)}
        return params, OptimizerState(inner, ema), metrics

    def evaluation_params(params: PyTree, state: OptimizerState) -> PyTree:
        if config.traits.averages:
            return optax.contrib.schedule_free_eval_params(state.transform[-1], params)
        return state.ema if config.ema else params

    return Optimizer(init, update, evaluation_params)


def _clip(limit: float) -> Transform:
    """Bound the global norm of the gradient.

    As `optax.clip_by_global_norm`, but by one factor, which XLA fuses with what follows: dividing by the norm costs a
    pass over all parameters on CPUs. So does no factor at all, since the squares of the norm are then kept for the
    second moment: an infinite limit is cheaper.
    """

    def clip(updates: PyTree, params: PyTree, *, norm: Array, **_: Any) -> PyTree:
        factor = jnp.minimum(1.0, limit / norm)
        return jax.tree.map(lambda u: factor * u, updates)

    return stateless(clip)


def _decay(decays: PyTree, cautious: bool) -> Transform:
    """Add decay · p to the direction of p; cautiously, only to entries that the direction already shrinks."""
    add = functools.partial(with_decay, cautious=cautious)
    return stateless(lambda updates, params, **_: jax.tree.map(add, updates, params, decays))


def _scale_by_rate(peaks: PyTree) -> Transform:
    """Turn directions into steps: times minus the group's peak rate and the schedule's traced multiplier."""
    return stateless(
        lambda updates, params, *, multiplier, **_: jax.tree.map(lambda u, r: -(multiplier * r) * u, updates, peaks)
    )


def _schedule_free(step: Transform, beta1: float) -> Transform:
    """`optax.contrib.schedule_free` whose rate is the traced multiplier.

    The rate only weighs the average (by its square, over all steps): a factor common to all steps has no effect, so
    the multiplier serves every group, whatever its peak.
    """

    def init(params: PyTree) -> PyTree:
        return optax.contrib.schedule_free(step, 1.0, beta1).init(params)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, *, multiplier: Array, **extra: Any):
        wrapped = optax.contrib.schedule_free(step, multiplier, beta1)
        return wrapped.update(updates, state, params, multiplier=multiplier, **extra)

    return transform_of(init, update)


def _average(config: OptimConfig, ema: PyTree, params: PyTree, fraction: Fraction) -> PyTree:
    """The moving average after a step: the weights themselves until `ema_start`."""
    started = jnp.asarray(fraction) >= config.ema_start

    def move(average: Array, param: Array) -> Array:
        return jnp.where(started, config.ema * average + (1.0 - config.ema) * param, param)

    return jax.tree.map(move, ema, params)
