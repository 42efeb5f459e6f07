"""A block's forward and backward pass as programs of their own, for walks that go forward and back in two loops.

JAX's derivative of a loop keeps what it likes and hands out gradients at the end. Here the block is traced once, what
the backward pass needs is kept by choice, and the backward pass stops after each gradient.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]  # of jax 0.12's stubs
from jaxtyping import Array, PyTree

from cramjax.model.layers import Context

Flowing = tuple[Array | None, Array | None]


class _Segment(NamedTuple):
    """A stretch of the backward pass, up to the next gradient of a parameter."""

    program: ClosedJaxpr
    inputs: list[jex.Var]
    outputs: list[jex.Var]
    """What comes after it, or the caller, reads."""
    gradients: list[int]
    """Parameters whose gradients are complete after it, by their place among the block's."""


class Passes(NamedTuple):
    """The two passes of a block, traced once. Forward keeps only what depends on the stream.

    What the derivative needs of parameters, context and random keys alone (a matrix, its rounding to the compute
    precision, a dropout mask) is made again from them in the backward pass: kept, it would be a second copy of the
    parameters, stacked over the layers.
    """

    program: ClosedJaxpr
    """`(params, x, context, layer) -> (y, *residuals)`, on flattened arguments."""
    kept: list[jex.Var]
    """Residuals that depend on the stream, each once."""
    remake: ClosedJaxpr
    """The part of the program without the stream: its outputs are the other residuals."""
    pull: ClosedJaxpr
    """`(*residuals, cotangent) -> (by params, by x, by context)`, flattened."""
    segments: list[_Segment]
    structure: Any
    """Of what `pull` returns."""

    def forward(self, params: PyTree, x: Array, context: Context, layer: Array) -> tuple[Array, list[Array]]:
        """The block's output, and what its backward pass wants kept."""
        outputs = jex.jaxpr_as_fun(self.program)(*jax.tree.leaves((params, x, context, layer)))
        named = dict(zip(map(id, self.program.jaxpr.outvars), outputs, strict=True))
        return outputs[0], [named[id(var)] for var in self.kept]

    def backward(
        self, params: PyTree, kept: list[Array], context: Context, layer: Array, g: Array
    ) -> tuple[PyTree, Array, Flowing]:
        """Gradients by parameters, stream and context, of a cotangent of the output."""
        residuals = self._residuals(params, kept, context, layer, g)
        return jax.tree.unflatten(self.structure, jex.jaxpr_as_fun(self.pull)(*residuals, g))

    def backward_by_tensor(
        self,
        params: PyTree,
        kept: list[Array],
        context: Context,
        layer: Array,
        g: Array,
        visit: Callable[[int, Array, Any], Any],
        carry: Any,
    ) -> tuple[Array, Flowing, Any]:
        """The backward pass with a stop at each parameter: what follows is not computed before the visit has ended.

        Args:
            params: the block's parameters.
            kept: from `forward`.
            context: what the block reads beside the stream.
            layer: number of the block.
            g: cotangent of its output.
            visit: `(place among the parameters, gradient, carry) -> carry`.
            carry: what visits change.

        Returns:
            Gradients by stream and context, and the carry.
        """
        jaxpr = self.pull.jaxpr
        constants = dict(zip(map(id, jaxpr.constvars), self.pull.consts, strict=True))
        arguments = (*self._residuals(params, kept, context, layer, g), g)
        values: dict[int, Any] = constants | dict(zip(map(id, jaxpr.invars), arguments, strict=True))

        def result(place: int) -> Array:
            atom = jaxpr.outvars[place]
            return (
                jnp.asarray(atom.val, cast(Any, atom.aval).dtype) if isinstance(atom, jex.Literal) else values[id(atom)]
            )

        for number, segment in enumerate(self.segments):
            results = jex.jaxpr_as_fun(segment.program)(*(values[id(var)] for var in segment.inputs))
            values |= dict(zip(map(id, segment.outputs), results, strict=True))
            for place in segment.gradients:
                carry = visit(place, result(place), carry)
            later = {id(var) for after in self.segments[number + 1 :] for var in after.inputs}
            waiting = {name: own for name, own in values.items() if name in later and name not in constants}
            if waiting:
                held, carry = jax.lax.optimization_barrier((list(waiting.values()), carry))
                values |= dict(zip(waiting, held, strict=True))
        _, by_x, by_context = jax.tree.unflatten(self.structure, list(map(result, range(len(jaxpr.outvars)))))
        return by_x, by_context, carry

    def _residuals(
        self, params: PyTree, kept: list[Array], context: Context, layer: Array, g: Array
    ) -> Iterator[Array]:
        # Nothing that is made again reads the stream; a cotangent has its shape.
        remade = iter(jex.jaxpr_as_fun(self.remake)(*jax.tree.leaves((params, g, context, layer))))
        named = dict(zip(map(id, self.kept), kept, strict=True))
        for var in self.program.jaxpr.outvars[1:]:
            yield named[id(var)] if id(var) in named else next(remade)


def trace_passes(block: Callable[..., Array], params: PyTree, x: Array, context: Context) -> Passes:
    """Trace both passes of a block.

    Args:
        block: `(params, x, context, layer) -> y`, y like x.
        params: parameters of one block, or their shapes.
        x: the stream.
        context: what the block reads beside it.
    """
    pulls: list[Any] = []

    def run(params: PyTree, x: Array, context: Context, layer: Array) -> tuple[Array, list[Array]]:
        y, pull = jax.vjp(lambda p, x, f: block(p, x, _with(context, f), layer), params, x, flowing(context))
        residuals, structure = jax.tree.flatten(pull)
        pulls.append(structure)
        return y, residuals

    program = jax.make_jaxpr(run)(params, x, context, jax.ShapeDtypeStruct((), jnp.int32))
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
    remake = program.replace(jaxpr=_part(jaxpr, eqns=free, outvars=rest))

    structures: list[Any] = []

    def pull(*arguments: Array) -> list[Array]:
        by, structure = jax.tree.flatten(jax.tree.unflatten(pulls[-1], arguments[:-1])(arguments[-1]))
        structures.append(structure)
        return by

    shapes = [var.aval for var in jaxpr.outvars]
    nested = jax.make_jaxpr(pull)(*shapes[1:], shapes[0])
    flat = jax.make_jaxpr(lambda *arguments: _inlined(nested, arguments))(*shapes[1:], shapes[0])
    segments = _cut(flat, len(jax.tree.leaves(params)))
    return Passes(program, cast(list[jex.Var], kept), remake, flat, segments, structures[-1])


def flowing(context: Context) -> Flowing:
    """What of a context gradients flow back through to the embedding."""
    return context.embedding, context.values


def _with(context: Context, flowing: Flowing) -> Context:
    return replace(context, embedding=flowing[0], values=flowing[1])


def _inlined(program: ClosedJaxpr, arguments: Any) -> list[Array]:
    """Run a program; what it holds in a rematerialised call is run as part of it."""
    jaxpr = program.jaxpr
    values = dict(zip(map(id, (*jaxpr.constvars, *jaxpr.invars)), (*program.consts, *arguments), strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[id(atom)]

    for equation in jaxpr.eqns:
        inputs = [value(atom) for atom in equation.invars]
        if equation.primitive.name in ("checkpoint", "remat2", "remat"):
            outputs = _inlined(ClosedJaxpr(equation.params["jaxpr"], []), inputs)
        else:
            read = [atom for atom in equation.invars if not isinstance(atom, jex.Literal)]
            alone = _part(jaxpr, constvars=[], invars=read, outvars=equation.outvars, eqns=[equation])
            outputs = jex.jaxpr_as_fun(ClosedJaxpr(alone, []))(*(value(atom) for atom in read))
        values |= dict(zip(map(id, equation.outvars), outputs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _cut(program: ClosedJaxpr, parameters: int) -> list[_Segment]:
    """The program in segments that each end where a gradient of a parameter is complete."""
    jaxpr = program.jaxpr
    places: dict[int, list[int]] = {}
    for place, var in enumerate(jaxpr.outvars[:parameters]):
        places.setdefault(id(var), []).append(place)
    made = {id(var) for equation in jaxpr.eqns for var in equation.outvars}
    # Gradients that are no equation's result, such as zeros, are there from the start.
    ready = [place for name, several in places.items() if name not in made for place in several]
    stretches: list[tuple[list[Any], list[int]]] = [([], ready)]
    for equation in jaxpr.eqns:
        stretches[-1][0].append(equation)
        complete = [place for var in equation.outvars for place in places.get(id(var), [])]
        if complete:
            stretches[-1][1].extend(complete)
            stretches.append(([], []))

    segments: list[_Segment] = []
    wanted = [var for var in jaxpr.outvars if not isinstance(var, jex.Literal)]
    for equations, gradients in reversed(stretches):
        own = {id(var): var for equation in equations for var in equation.outvars}
        outputs = list({id(var): var for var in wanted if id(var) in own}.values())
        read = {
            id(atom): atom
            for equation in equations
            for atom in equation.invars
            if not isinstance(atom, jex.Literal) and id(atom) not in own
        }
        inputs = list(read.values())
        part = _part(jaxpr, constvars=[], invars=inputs, outvars=outputs, eqns=equations)
        segments.append(_Segment(ClosedJaxpr(part, []), inputs, outputs, gradients))
        wanted = [*wanted, *inputs]
    return segments[::-1]


def _part(jaxpr: jex.Jaxpr, **changes: Any) -> jex.Jaxpr:
    """A part of a program, as a program; of where it comes from, the function is still true."""
    invars, outvars = changes.get("invars", jaxpr.invars), changes.get("outvars", jaxpr.outvars)
    names, paths = ("",) * len(invars), ("",) * len(outvars)
    return jaxpr.replace(**changes, debug_info=jaxpr.debug_info._replace(arg_names=names, result_paths=paths))
