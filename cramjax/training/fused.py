"""The training step of LOMO and AdaLomo: the backward walk updates each layer in place, and holds no gradient."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cramjax.config import Remat
from cramjax.model import Objective
from cramjax.optim import FusedOptimizer, OptimizerState, When, make_fused
from cramjax.optim.lomo import Part
from cramjax.parallel import StateSharding, one_layer
from cramjax.training import walk
from cramjax.training.step import Batch, State, StepMetrics
from cramjax.training.whole import one_program

# Streams of random numbers of a step: the first is the plain step's, for masking and dropout.
_BATCH_STREAM, _ROUNDING_STREAM = 0, 1


class _Updated(NamedTuple):
    """What a backward walk carries."""

    params: PyTree
    moments: PyTree
    square: Float[Array, ""]
    """Sum of the squares of the gradient so far."""


def make_fused_step(
    objective: Objective, optimizer: FusedOptimizer, *, remat: Remat, sharding: StateSharding | None = None
) -> Callable[[State, Batch, Float[Array, ""]], tuple[State, StepMetrics]]:
    """The step `(state, batch, fraction) -> (state, metrics)`, as of `make_step`, for a batch of one microbatch.

    Where the norm of the gradient is bounded, a first backward walk finds it.

    Args:
        objective: the loss, in pieces.
        optimizer: updates a tensor from its gradient.
        remat: what backward walks compute again.
        sharding: how devices share gradients and the update; None on one device.
    """

    def step(state: State, batch: Batch, fraction: Float[Array, ""]) -> tuple[State, StepMetrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        batch_key, rounding_key = (jax.random.fold_in(key, stream) for stream in (_BATCH_STREAM, _ROUNDING_STREAM))
        params = state.params
        trace = walk.forward(objective, params, batch.tokens[0], batch_key, fraction, remat=remat)
        outer = {part: params[part] for part in ("embed", "head")}
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
        visitor = _updates(optimizer, when, objective.model.repeats, sharding)
        loss, carry = walk.backward(objective, trace, outer, visitor, carry)
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


def _updates(
    optimizer: FusedOptimizer, when: Callable[[int | Array], When], layers: int, sharding: StateSharding | None
) -> walk.Visitor:
    """Update every tensor of the model with its gradient."""

    def updated(part: Part, place: int, gradient: Array, carry: _Updated, layer: int | Array) -> _Updated:
        stacked = part == "blocks"
        params, structure = jax.tree.flatten(carry.params[part])
        moments = structure.flatten_up_to(carry.moments[part])
        own = params[place], moments[place]
        param, moment = _layer_of(own, layer) if stacked else own
        if sharding is not None:
            place_of = jax.tree.leaves(sharding.update[part])[place]
            share = one_layer(place_of) if stacked else place_of
            gradient, param = jax.lax.with_sharding_constraint((gradient, param), (share, share))
        new = optimizer.update(part, place, gradient, moment, param, when(layer))
        params[place], moments[place] = _with_layer(own, new, layer) if stacked else new
        return _Updated(
            carry.params | {part: structure.unflatten(params)},
            carry.moments | {part: structure.unflatten(moments)},
            carry.square + jnp.sum(jnp.square(gradient)),
        )

    def tensor(layer: Array, place: int, gradient: Array, carry: _Updated) -> _Updated:
        with jax.named_scope("update"):
            return updated("blocks", place, gradient, carry, layer)

    def outer(part: Literal["head", "embed"], gradients: PyTree, carry: _Updated) -> _Updated:
        for place, gradient in enumerate(jax.tree.leaves(gradients)):
            with jax.named_scope("update"):
                carry = updated(part, place, gradient, carry, {"head": layers, "embed": layers + 1}[part])
        return carry

    return walk.Visitor(lambda carry, layer: _layer_of(carry.params["blocks"], layer), None, outer, tensor)


def _squares(blocks: PyTree) -> walk.Visitor:
    """Only add up the squares of the gradient."""
    return walk.Visitor(
        read=lambda carry, layer: _layer_of(blocks, layer),
        block=None,
        outer=lambda part, gradients, carry: sum(map(_square, jax.tree.leaves(gradients)), carry),
        tensor=lambda layer, place, gradient, carry: carry + _square(gradient),
    )


def _square(gradient: Array) -> Array:
    return jnp.sum(jnp.square(gradient))


def _layer_of(stacked: PyTree, layer: int | Array) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stacked)


def _with_layer(stacked: PyTree, values: PyTree, layer: int | Array) -> PyTree:
    """Stacked arrays with one layer replaced; in a loop that carries them, in place."""
    return jax.tree.map(lambda x, v: jax.lax.dynamic_update_index_in_dim(x, v, layer, 0), stacked, values)


METHOD = one_program(
    lambda config, model: make_fused(config.optim, model.weights),
    lambda config, parts, sharding: make_fused_step(
        parts.loss_function, parts.optimizer, remat=config.train.remat, sharding=sharding
    ),
    accumulates=False,
)
