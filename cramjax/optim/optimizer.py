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
from cramjax.optim.groups import path_name, peak_rate, weight_decay, with_decay
from cramjax.optim.muon import scale_by_muon
from cramjax.optim.schedule import Fraction, schedule

Objective = Callable[[PyTree], Float[Array, ""]]
Transform = optax.GradientTransformation | optax.GradientTransformationExtraArgs

_ADAN_DIFFERENCE_DECAY = 0.92
_SOPHIA_GAMMA = 0.01
_SOPHIA_INTERVAL = 10


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
    _check(config)
    multiplier_at = schedule(config)
    step = optax.chain(
        _direction(config, weights),
        _decay(jax.tree.map(lambda w: weight_decay(config, w.role, width_ratio), weights), config.cautious_decay),
        _scale_by_rate(jax.tree.map(lambda w: peak_rate(config, w.role, width_ratio), weights)),
    )
    schedule_free = config.name == "schedule_free_adamw"
    transform = optax.chain(
        _clip(math.inf if config.clip is None else config.clip),
        _schedule_free(step, config.beta1) if schedule_free else step,
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
        if schedule_free:
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

    return _stateless(clip)


def _direction(config: OptimConfig, weights: PyTree) -> Transform:
    """The unit-rate descent direction, before decay; its sign is the gradient's.

    What `beta1` and `beta2` mean: the first and second moments of Adam(W), of Muon's AdamW groups and of Sophia
    (second: its Hessian diagonal); Lion's interpolation and momentum; Adan's first and third decay (its second, of
    gradient differences, is 0.92 as published). Adafactor keeps no momentum and reads neither.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    match config.name:
        case "adamw":
            return adam
        case "muon":
            leaves = jax.tree.leaves_with_path(weights)
            splits = {path_name(path): weight.widths for path, weight in leaves if weight.widths}
            muon = scale_by_muon(config.momentum, config.newton_schulz_steps, splits)
            labels = jax.tree.map(lambda w: "muon" if w.role == "matrix" else "adam", weights)
            return optax.partition({"muon": muon, "adam": adam}, labels)
        case "lion":
            return optax.scale_by_lion(config.beta1, config.beta2)
        case "adan":
            return optax.scale_by_adan(config.beta1, _ADAN_DIFFERENCE_DECAY, config.beta2, config.eps)
        case "sophia":
            return optax.contrib.sophia(
                learning_rate=-1.0,
                b1=config.beta1,
                b2=config.beta2,
                eps=config.eps,
                weight_decay=0.0,
                gamma=_SOPHIA_GAMMA,
                update_interval=_SOPHIA_INTERVAL,
                hessian_diagonal_fn=_hutchinson(),
            )
        case "adafactor":
            # The relative step of the paper: clipped to rms 1, times max(1e-3, rms of the weights).
            adafactor = optax.chain(
                optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
            )
            labels = jax.tree.map(lambda w: "rest" if w.repeats is None else "layers", weights)
            return optax.partition({"layers": _each_layer(adafactor), "rest": adafactor}, labels)
        case "lomo" | "adalomo":
            raise ConfigError(f"optim.name={config.name} updates tensors as their gradients come: use make_fused.")
        case "schedule_free_adamw":
            return optax.scale_by_rms(config.beta2, config.eps, eps_in_sqrt=False, bias_correction=True)


def _decay(decays: PyTree, cautious: bool) -> Transform:
    """Add decay · p to the direction of p; cautiously, only to entries that the direction already shrinks."""
    add = functools.partial(with_decay, cautious=cautious)
    return _stateless(lambda updates, params, **_: jax.tree.map(add, updates, params, decays))


def _scale_by_rate(peaks: PyTree) -> Transform:
    """Turn directions into steps: times minus the group's peak rate and the schedule's traced multiplier."""
    return _stateless(
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

    return _transform(init, update)


def _each_layer(transform: Transform) -> Transform:
    """Apply a transformation to every layer of stacked parameters by itself, so that layers share no statistic."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None):
        return jax.vmap(transform.update)(updates, state, params)

    return optax.GradientTransformation(jax.vmap(transform.init), update)


class _HutchinsonState(NamedTuple):
    key: Array


def _hutchinson() -> Transform:
    """Unbiased estimate v ⊙ Hv of the Hessian's diagonal, v of random signs (Liu et al. 2023, arXiv:2305.14342, §2.3).

    optax's own takes the product Hv by forward over reverse mode, which kernels with hand-written gradients refuse;
    reverse over reverse costs about the same and takes any of them.
    """

    def init(params: PyTree) -> _HutchinsonState:
        del params
        return _HutchinsonState(jax.random.key_data(jax.random.key(0)))

    def update(
        updates: PyTree, state: _HutchinsonState, params: PyTree = None, *, objective: Objective | None, **_: Any
    ):
        del updates
        if objective is None:
            raise ValueError("Sophia estimates curvature from the loss itself: pass objective=loss(params) to update")
        key, signs_key = jax.random.split(jax.random.wrap_key_data(state.key))
        signs = optax.tree.random_like(signs_key, params, jax.random.rademacher)
        product = jax.grad(lambda p: optax.tree.vdot(jax.grad(objective)(p), signs))(params)
        return optax.tree.mul(signs, product), _HutchinsonState(jax.random.key_data(key))

    return _transform(init, update)


def _average(config: OptimConfig, ema: PyTree, params: PyTree, fraction: Fraction) -> PyTree:
    """The moving average after a step: the weights themselves until `ema_start`."""
    started = jnp.asarray(fraction) >= config.ema_start

    def move(average: Array, param: Array) -> Array:
        return jnp.where(started, config.ema * average + (1.0 - config.ema) * param, param)

    return jax.tree.map(move, ema, params)


def _stateless(update: Callable[..., PyTree]) -> Transform:
    """A transformation without state from `(updates, params, **extra) -> updates`."""

    def with_state(updates: PyTree, state: optax.EmptyState, params: PyTree = None, **extra: Any):
        return update(updates, params, **extra), state

    return _transform(lambda _: optax.EmptyState(), with_state)


def _transform(
    init: Callable[..., PyTree], update: Callable[..., tuple[PyTree, PyTree]]
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose update takes keywords of its own; optax's type for it names none."""
    return optax.GradientTransformationExtraArgs(init, update)


def _check(config: OptimConfig) -> None:
    if not 0 <= config.ema < 1:
        raise ConfigError(f"optim.ema must be in [0, 1), got {config.ema}")
    if config.name == "schedule_free_adamw" and config.ema:
        raise ConfigError(
            f"optim.ema must be 0 with schedule_free_adamw, which evaluates averaged weights already; got {config.ema}"
        )
    if config.name == "schedule_free_adamw" and not 0 < config.beta1 < 1:
        raise ConfigError(f"optim.beta1 must be between 0 and 1 with schedule_free_adamw, got {config.beta1}")
    if config.clip is not None and config.clip <= 0:
        raise ConfigError(f"optim.clip must be above 0, or null for no clipping, got {config.clip}")
    if config.newton_schulz_steps < 1:
        raise ConfigError(f"optim.newton_schulz_steps must be at least 1, got {config.newton_schulz_steps}")
