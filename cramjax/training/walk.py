"""The walk forward and back over the stack that hands out each gradient as soon as it exists, and keeps none.

`forward` keeps what the blocks need to be differentiated; `backward` visits the head, the blocks from the last to the
first, and the embedding with their gradients. What becomes of a gradient is the visitor's affair: LOMO updates the
parameters with it in place, ZeRO-Offload sends it to the host.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cramjax.config import Remat
from cramjax.kernels.lookup import add_rows, lookup
from cramjax.model.layers import Context
from cramjax.model.objectives import Loss, Objective, Task
from cramjax.model.remat import remat_block
from cramjax.training.passes import Flowing, Passes, flowing, trace_passes

Carry = Any


@dataclass(frozen=True)
class Visitor:
    """What is done with gradients on the way back. Gradients are float32, of the mean loss per predicted token."""

    read: Callable[[Carry, Array], PyTree]
    """`(carry, layer) -> parameters` of a block, as the forward walk had them: from the carry, if visits change them
    there, so that they are changed in place."""
    block: Callable[[Array, PyTree, PyTree, Carry], Carry] | None
    """`(layer, parameters, gradients, carry) -> carry`, for each block. `layer` is traced."""
    outer: Callable[[Literal["head", "embed"], PyTree, Carry], Carry]
    """`(part, gradients, carry) -> carry`: for the head before the blocks, for the embedding after them."""
    tensor: Callable[[Array, int, Array, Carry], Carry] | None = None
    """`(layer, place, gradient, carry) -> carry`, instead of `block`: for each parameter of a block, by its place among
    the block's leaves, before the gradient of the next is computed."""


class Trace(NamedTuple):
    """What a forward walk leaves for backward walks."""

    task: Task
    context: Context
    stream: Float[Array, "batch seq embed"]
    """After the last block."""
    kept: list[Float[Array, "layer ..."]]
    """What each block needs to be differentiated, beside its parameters and the context."""
    passes: Passes


def forward(
    objective: Objective,
    params: PyTree,
    tokens: Array,
    rng: Array | None,
    fraction: float | Array,
    *,
    remat: Remat = "none",
) -> Trace:
    """Walk forward, in training.

    Args:
        objective: the loss.
        params: all parameters.
        tokens: a batch; see `Objective`.
        rng: random key of masking and dropout.
        fraction: share of the budget that is spent.
        remat: what backward walks compute again; see `TrainConfig.remat`.
    """
    task = objective.task(tokens, rng, fraction, True)
    stream, context = objective.start(params, task)
    first = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), params["blocks"])
    passes = trace_passes(remat_block(objective.model.block, remat, scanned=True), first, stream, context)

    def step(x: Array, item: tuple[PyTree, Array]) -> tuple[Array, list[Array]]:
        with jax.named_scope("layer"):
            return passes.forward(item[0], x, context, item[1])

    layers = jnp.arange(objective.model.repeats)
    stream, kept = jax.lax.scan(step, stream, (params["blocks"], layers))
    return Trace(task, context, stream, kept, passes)


def backward(objective: Objective, trace: Trace, outer: PyTree, visitor: Visitor, carry: Carry) -> tuple[Loss, Carry]:
    """Walk back, and visit every part of the model with its gradient.

    Where the head is tied to the embedding, the head's share of the embedding's gradient is held until the lookup's is
    there. Nothing else outlives a visit.

    Args:
        objective: the loss, as in `forward`.
        trace: from `forward`.
        outer: the parameters `embed` and `head`, as the forward walk had them.
        visitor: what is done with gradients.
        carry: what the visitor changes.

    Returns:
        The loss, and the carry after the last visit.
    """
    task, context, passes = trace.task, trace.context, trace.passes
    table: Array = outer["embed"]["token"]["table"]

    def end(head: PyTree, table: Array, stream: Array) -> tuple[Array, Loss]:
        loss = objective.end({"head": head, "embed": {"token": {"table": table}}}, task, stream)
        return loss.total, loss

    differentiate = jax.grad(end, argnums=(0, 1, 2), has_aux=True)
    (by_head, by_table, by_stream), loss = differentiate(outer["head"], table, trace.stream)

    def mean(gradients: PyTree) -> PyTree:
        return jax.tree.map(lambda g: g.astype(jnp.float32) / task.predicted, gradients)

    carry = visitor.outer("head", mean(by_head), carry)
    # The visit comes first: else the head's gradient might wait for it while the blocks are walked.
    by_stream, carry = jax.lax.optimization_barrier((by_stream, carry))
    layers = objective.model.repeats

    def step(index: Any, state: tuple[Array, Flowing, Carry]) -> tuple[Array, Flowing, Carry]:
        by_stream, by_context, carry = state
        layer = layers - 1 - index
        params = visitor.read(carry, layer)
        kept = [jax.lax.dynamic_index_in_dim(k, layer, keepdims=False) for k in trace.kept]
        arguments = (params, kept, context, layer, by_stream)
        if visitor.tensor is not None:
            tensor = visitor.tensor
            by_stream, more, carry = passes.backward_by_tensor(
                *arguments, lambda place, gradient, carry: tensor(layer, place, mean(gradient), carry), carry
            )
        else:
            assert visitor.block is not None, "a visitor visits blocks or tensors"
            with jax.named_scope("layer"):
                by_params, by_stream, more = passes.backward(*arguments)
            with jax.named_scope("visit"):
                carry = visitor.block(layer, params, mean(by_params), carry)
        return by_stream, jax.tree.map(jnp.add, by_context, more), carry

    by_context = jax.tree.map(jnp.zeros_like, flowing(context))
    by_stream, by_context, carry = jax.lax.fori_loop(0, layers, step, (by_stream, by_context, carry))

    def start(embed: PyTree, rows: Array) -> tuple[Array, Flowing]:
        stream, context = objective.start({"embed": embed}, task, rows)
        return stream, flowing(context)

    _, pull = jax.vjp(start, outer["embed"], lookup(table, task.tokens))
    by_embed, by_rows = pull((by_stream, by_context))
    # The lookup's share is added to the head's where that lies, or to zeros that do not exist before.
    share = by_table
    if not objective.model.config.tied:
        share, by_rows = jax.lax.optimization_barrier((jnp.zeros(()), by_rows))
    share = jnp.broadcast_to(share.astype(jnp.float32), table.shape)
    by_embed = by_embed | {"token": {"table": add_rows(share, task.tokens, by_rows)}}
    return loss, visitor.outer("embed", mean(by_embed), carry)
