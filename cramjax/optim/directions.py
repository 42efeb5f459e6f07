"""Directions: a function for each optimizer of `cramjax.optimizers` that is not layerwise, of the same name.

`(config, weights) -> transformation` of gradients into the unit-rate descent direction, before decay; its sign is the
gradient's. `weights` are the parameters' declarations, in their structure.

What `beta1` and `beta2` mean: the first and second moments of Adam(W), of Muon's AdamW groups and of Sophia (second:
its Hessian diagonal); Lion's interpolation and momentum; Adan's first and third decay (its second, of gradient
differences, is 0.92 as published). Adafactor keeps no momentum and reads neither.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, PyTree

from cramjax.config import OptimConfig
from cramjax.model.weights import Weight
from cramjax.optim.groups import path_name
from cramjax.optim.muon import scale_by_muon

Objective = Callable[[PyTree], Float[Array, ""]]
Transform = optax.GradientTransformation | optax.GradientTransformationExtraArgs

_ADAN_DIFFERENCE_DECAY = 0.92
_SOPHIA_GAMMA = 0.01
_SOPHIA_INTERVAL = 10


def adamw(config: OptimConfig, weights: PyTree) -> Transform:
    """Adam (Kingma & Ba 2015), whose decay is decoupled."""
    del weights
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps)


def muon(config: OptimConfig, weights: PyTree) -> Transform:
    """Muon on matrices, and Adam on the rest."""
    leaves = jax.tree.leaves_with_path(weights)
    splits = {path_name(path): weight.widths for path, weight in leaves if weight.widths}
    orthogonal = scale_by_muon(config.momentum, config.newton_schulz_steps, splits)
    labels = jax.tree.map(lambda w: "muon" if w.role == "matrix" else "adam", weights)
    return optax.partition({"muon": orthogonal, "adam": adamw(config, weights)}, labels)


def lion(config: OptimConfig, weights: PyTree) -> Transform:
    """Lion (Chen et al. 2023, arXiv:2302.06675)."""
    del weights
    return optax.scale_by_lion(config.beta1, config.beta2)


def adan(config: OptimConfig, weights: PyTree) -> Transform:
    """Adan (Xie et al. 2022, arXiv:2208.06677)."""
    del weights
    return optax.scale_by_adan(config.beta1, _ADAN_DIFFERENCE_DECAY, config.beta2, config.eps)


def sophia(config: OptimConfig, weights: PyTree) -> Transform:
    """Sophia-H (Liu et al. 2023, arXiv:2305.14342): it needs the loss as a function of the parameters."""
    del weights
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


def adafactor(config: OptimConfig, weights: PyTree) -> Transform:
    """Adafactor (Shazeer & Stern 2018), with the relative step of the paper: clipped to rms 1, times max(1e-3, rms of
    the weights).
    """
    del config
    each = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    labels = jax.tree.map(lambda w: "rest" if w.repeats is None else "layers", weights)
    return optax.partition({"layers": _each_layer(each), "rest": each}, labels)


def schedule_free_adamw(config: OptimConfig, weights: PyTree) -> Transform:
    """What the average of schedule-free AdamW is of (Defazio et al. 2024): Adam without its first moment."""
    del weights
    return optax.scale_by_rms(config.beta2, config.eps, eps_in_sqrt=False, bias_correction=True)


def levelling(transform: Transform, weights: PyTree) -> Transform:
    """A direction, but of what levels loads the sign of what is in its gradient's place (Wang et al. 2024,
    arXiv:2408.15664).

    Args:
        transform: gradients into directions.
        weights: declarations, in the structure of the parameters.
    """
    if all(weight.role != "balance" for weight in jax.tree.leaves(weights)):
        return transform

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any):
        made, state = optax.with_extra_args_support(transform).update(updates, state, params, **extra)

        def own(weight: Weight, direction: Array, gradient: Array) -> Array:
            return jnp.sign(gradient) if weight.role == "balance" else direction

        return jax.tree.map(own, weights, made, updates), state

    return transform_of(transform.init, update)


def _each_layer(transform: Transform) -> Transform:
    """Apply a transformation to every layer of stacked parameters by itself, so that layers share no statistic."""

    def init(params: PyTree) -> PyTree:
        return jax.vmap(transform.init)(params) if jax.tree.leaves(params) else ()  # all of them may be frozen

    def update(updates: PyTree, state: PyTree, params: PyTree = None):
        return jax.vmap(transform.update)(updates, state, params) if jax.tree.leaves(updates) else (updates, state)

    return optax.GradientTransformation(init, update)


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

    return transform_of(init, update)


def stateless(update: Callable[..., PyTree]) -> Transform:
    """A transformation without state from `(updates, params, **extra) -> updates`."""

    def with_state(updates: PyTree, state: optax.EmptyState, params: PyTree = None, **extra: Any):
        return update(updates, params, **extra), state

    return transform_of(lambda _: optax.EmptyState(), with_state)


def transform_of(
    init: Callable[..., PyTree], update: Callable[..., tuple[PyTree, PyTree]]
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose update takes keywords of its own; optax's type for it names none."""
    return optax.GradientTransformationExtraArgs(init, update)
