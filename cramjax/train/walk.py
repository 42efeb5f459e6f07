"""The walk forward and back over the stack that hands out each gradient as soon as it exists, and keeps none.

`forward` keeps what the blocks need to be differentiated; `backward` visits the head, the blocks from the last to the
first, and the embedding with their gradients. What becomes of a gradient is the visitor's affair: LOMO updates the
parameters with it in place, ZeRO-Offload sends it to the host.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cramjax.config import Remat
from cramjax.model.layers import Context
from cramjax.model.objectives import Loss, Objective, Task

Carry = Any


@dataclass(frozen=True)
class Visitor:
    """What is done with gradients on the way back. Gradients are float32, of the mean loss per predicted token."""

    read: Callable[[Carry, Array], PyTree]
    """`(carry, layer) -> parameters` of a block, as the forward walk had them: from the carry, if visits change them
    there, so that they are changed in place."""
    block: Callable[[Array, PyTree, PyTree, Carry], Carry]
    """`(layer, parameters, gradients, carry) -> carry`, for each block. `layer` is traced."""
    outer: Callable[[Literal["head", "embed"], PyTree, Carry], Carry]
    """`(part, gradients, carry) -> carry`: for the head before the blocks, for the embedding after them."""


class Trace(NamedTuple):
    """What a forward walk leaves for backward walks."""

    task: Task
    context: Context
    stream: Float[Array, "batch seq embed"]
    """After the last block."""
    kept: list[Float[Array, "layer ..."]]
    """What each block needs to be differentiated, beside its parameters and the context."""
    block: "DifferentiableBlock"


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
    block = differentiable(rematerialised(objective.model.block, remat), first, stream, context)

    def step(x: Array, item: tuple[PyTree, Array]) -> tuple[Array, list[Array]]:
        with jax.named_scope("layer"):
            return block.forward(item[0], x, context, item[1])

    layers = jnp.arange(objective.model.config.layers)
    stream, kept = jax.lax.scan(step, stream, (params["blocks"], layers))
    return Trace(task, context, stream, kept, block)


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
    task, context, block = trace.task, trace.context, trace.block
    ends = {name: outer[name] for name in ("embed", "head") if name == "head" or objective.model.config.tied}

    def end(ends: PyTree, stream: Array) -> tuple[Array, Loss]:
        loss = objective.end(ends, task, stream)
        return loss.total, loss

    (by_ends, by_stream), loss = jax.grad(end, argnums=(0, 1), has_aux=True)(ends, trace.stream)

    def mean(gradients: PyTree) -> PyTree:
        return jax.tree.map(lambda g: g.astype(jnp.float32) / task.predicted, gradients)

    carry = visitor.outer("head", mean(by_ends["head"]), carry)
    layers = objective.model.config.layers

    def step(index: Any, state: tuple[Array, _Flowing, Carry]) -> tuple[Array, _Flowing, Carry]:
        by_stream, by_context, carry = state
        layer = layers - 1 - index
        params = visitor.read(carry, layer)
        kept = [jax.lax.dynamic_index_in_dim(k, layer, keepdims=False) for k in trace.kept]
        with jax.named_scope("layer"):
            by_params, by_stream, more = block.backward(params, kept, context, layer, by_stream)
        by_context = jax.tree.map(jnp.add, by_context, more)
        with jax.named_scope("visit"):
            return by_stream, by_context, visitor.block(layer, params, mean(by_params), carry)

    by_context = jax.tree.map(jnp.zeros_like, _flowing(context))
    by_stream, by_context, carry = jax.lax.fori_loop(0, layers, step, (by_stream, by_context, carry))

    def start(embed: PyTree) -> tuple[Array, _Flowing]:
        stream, context = objective.start({"embed": embed}, task)
        return stream, _flowing(context)

    (by_embed,) = jax.vjp(start, outer["embed"])[1]((by_stream, by_context))
    if "embed" in by_ends:
        by_embed = jax.tree.map(jnp.add, by_embed, by_ends["embed"])
    return loss, visitor.outer("embed", mean(by_embed), carry)


def rematerialised(block: Callable[..., Array], remat: Remat) -> Callable[..., Array]:
    """A block of which backward passes keep only what a policy says."""
    match remat:
        case "none":
            return block
        case "full":
            # Nothing is computed twice in one loop body, so there is nothing to keep the compiler from merging.
            return jax.checkpoint(block, prevent_cse=False)
        case _:
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            return jax.checkpoint(block, prevent_cse=False, policy=policy)


class DifferentiableBlock(NamedTuple):
    """The two passes of a block, traced once. Forward keeps only what depends on the stream.

    What the derivative needs of parameters, context and random keys alone (a matrix, its rounding to the compute
    precision, a dropout mask) is made again from them in the backward pass: kept, it would be a second copy of the
    parameters, stacked over the layers.
    """

    program: jex.ClosedJaxpr
    """`(params, x, context, layer) -> (y, *residuals)`, on flattened arguments."""
    pull: Any
    """Structure of the block's derivative, a pytree of the residuals."""
    kept: list[jex.Var]
    """Residuals that depend on the stream, each once."""
    remake: jex.ClosedJaxpr
    """The part of the program without the stream: its outputs are the other residuals."""

    def forward(self, params: PyTree, x: Array, context: Context, layer: Array) -> tuple[Array, list[Array]]:
        """The block's output, and what its backward pass wants kept."""
        outputs = jex.jaxpr_as_fun(self.program)(*jax.tree.leaves((params, x, context, layer)))
        named = dict(zip(map(id, self.program.jaxpr.outvars), outputs, strict=True))
        return outputs[0], [named[id(var)] for var in self.kept]

    def backward(
        self, params: PyTree, kept: list[Array], context: Context, layer: Array, g: Array
    ) -> tuple[PyTree, Array, "_Flowing"]:
        """Gradients by parameters, stream and context of a cotangent of the output."""
        # Nothing that is made again reads the stream; a cotangent has its shape.
        remade = jex.jaxpr_as_fun(self.remake)(*jax.tree.leaves((params, g, context, layer)))
        named = dict(zip(map(id, self.kept), kept, strict=True))
        rest = iter(remade)
        residuals = [named[id(var)] if id(var) in named else next(rest) for var in self.program.jaxpr.outvars[1:]]
        return jax.tree.unflatten(self.pull, residuals)(g)


def differentiable(block: Callable[..., Array], params: PyTree, x: Array, context: Context) -> DifferentiableBlock:
    """Trace both passes of a block.

    Args:
        block: `(params, x, context, layer) -> y`, y like x.
        params: parameters of one block, or their shapes.
        x: the stream.
        context: what the block reads beside it.
    """
    structure: list[Any] = []

    def run(params: PyTree, x: Array, context: Context, layer: Array) -> tuple[Array, list[Array]]:
        y, pull = jax.vjp(lambda p, x, f: block(p, x, _with(context, f), layer), params, x, _flowing(context))
        residuals, pull = jax.tree.flatten(pull)
        structure.append(pull)
        return y, residuals

    layer = jax.ShapeDtypeStruct((), jnp.int32)
    program = jax.make_jaxpr(run)(params, x, context, layer)
    jaxpr = program.jaxpr
    reached = {id(jaxpr.invars[len(jax.tree.leaves(params))])}
    free = []
    for equation in jaxpr.eqns:
        if any(id(var) in reached for var in equation.invars):
            reached.update(map(id, equation.outvars))
        else:
            free.append(equation)
    residuals = jaxpr.outvars[1:]
    kept = list({id(var): var for var in residuals if id(var) in reached}.values())
    rest = [var for var in residuals if id(var) not in reached]
    remake = program.replace(jaxpr=jaxpr.replace(eqns=free, outvars=rest, debug_info=None))
    return DifferentiableBlock(program, structure[-1], kept, remake)


_Flowing = tuple[Array | None, Array | None]


def _flowing(context: Context) -> _Flowing:
    """What of a context gradients flow back through to the embedding."""
    return context.embedding, context.values


def _with(context: Context, flowing: _Flowing) -> Context:
    return replace(context, embedding=flowing[0], values=flowing[1])
