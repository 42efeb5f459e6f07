"""The training step of LOMO and AdaLomo: the backward walk updates each layer in place, and holds no gradient."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cramjax.config import Remat
from cramjax.model import Objective
from cramjax.optim import FusedOptimizer, OptimizerState, When
from cramjax.train import walk
from cramjax.train.step import Batch, State, StepMetrics

# Streams of random numbers of a step: the first is the plain step's, for masking and dropout.
_BATCH_STREAM, _ROUNDING_STREAM = 0, 1


class _Updated(NamedTuple):
    """What a backward walk carries."""

    params: PyTree
    moments: PyTree
    square: Float[Array, ""]
    """Sum of the squares of the gradient so far."""


def make_fused_step(
    objective: Objective, optimizer: FusedOptimizer, *, remat: Remat
) -> Callable[[State, Batch, Float[Array, ""]], tuple[State, StepMetrics]]:
    """The step `(state, batch, fraction) -> (state, metrics)`, as of `make_step`, for a batch of one microbatch.

    Where the norm of the gradient is bounded, a first backward walk finds it.

    Args:
        objective: the loss, in pieces.
        optimizer: updates a layer from its gradient.
        remat: what backward walks compute again.
    """
    layers = objective.model.config.layers

    def step(state: State, batch: Batch, fraction: Float[Array, ""]) -> tuple[State, StepMetrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        batch_key, rounding_key = (jax.random.fold_in(key, stream) for stream in (_BATCH_STREAM, _ROUNDING_STREAM))
        params = state.params
        trace = walk.forward(objective, params, batch.tokens[0], batch_key, fraction, remat=remat)
        outer = {name: params[name] for name in ("embed", "head")}
        factor: Any = 1.0
        norm = None
        if optimizer.clip is not None:
            _, square = walk.backward(objective, trace, outer, _squares(params["blocks"]), jnp.zeros(()))
            norm = jnp.sqrt(square)
            factor = jnp.minimum(1.0, optimizer.clip / norm)
            # Else the compiler would keep the head's gradient for the second walk, instead of computing it again.
            stream, factor = jax.lax.optimization_barrier((trace.stream, factor))
            trace = trace._replace(stream=stream)

        def when(layer: int | Array) -> When:
            return When(state.step, fraction, factor, jax.random.fold_in(rounding_key, layer))

        carry = _Updated(params, state.optimizer.transform, jnp.zeros(()))
        loss, carry = walk.backward(objective, trace, outer, _updates(optimizer, when, layers), carry)
        norm = jnp.sqrt(carry.square) if norm is None else norm
        mean_loss = loss.nll / loss.tokens
        metrics = StepMetrics(
            loss=mean_loss,
            accuracy=loss.correct / loss.tokens,
            grad_norm=norm,
            lr=optimizer.rate(fraction),
            finite=jnp.isfinite(mean_loss) & jnp.isfinite(norm),
        )
        return State(state.step + 1, carry.params, OptimizerState(carry.moments, ()), state.key), metrics

    return step


def _updates(optimizer: FusedOptimizer, when: Callable[[int | Array], When], layers: int) -> walk.Visitor:
    """Update every part of the model with its gradient."""

    def block(layer: Array, params: PyTree, gradients: PyTree, carry: _Updated) -> _Updated:
        moments = layer_of(carry.moments["blocks"], layer)
        params, moments = optimizer.update("blocks", gradients, moments, params, when(layer))
        return _Updated(
            carry.params | {"blocks": with_layer(carry.params["blocks"], params, layer)},
            carry.moments | {"blocks": with_layer(carry.moments["blocks"], moments, layer)},
            carry.square + _square(gradients),
        )

    def outer(part: Literal["head", "embed"], gradients: PyTree, carry: _Updated) -> _Updated:
        number = {"head": layers, "embed": layers + 1}[part]
        params, moments = optimizer.update(part, gradients, carry.moments[part], carry.params[part], when(number))
        return _Updated(
            carry.params | {part: params}, carry.moments | {part: moments}, carry.square + _square(gradients)
        )

    return walk.Visitor(lambda carry, layer: layer_of(carry.params["blocks"], layer), block, outer)


def _squares(blocks: PyTree) -> walk.Visitor:
    """Only add up the squares of the gradient."""
    return walk.Visitor(
        read=lambda carry, layer: layer_of(blocks, layer),
        block=lambda layer, params, gradients, carry: carry + _square(gradients),
        outer=lambda part, gradients, carry: carry + _square(gradients),
    )


def layer_of(stacked: PyTree, layer: Array) -> PyTree:
    """One layer of stacked arrays."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stacked)


def with_layer(stacked: PyTree, values: PyTree, layer: Array) -> PyTree:
    """Stacked arrays with one layer replaced; in a loop that carries them, in place."""
    return jax.tree.map(lambda x, v: jax.lax.dynamic_update_index_in_dim(x, v, layer, 0), stacked, values)


def _square(gradients: PyTree) -> Array:
    return sum((jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)), jnp.zeros(()))
