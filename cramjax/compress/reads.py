"""What each program of a walk through a block reads: found in its trace, by going back from what it gives.

It says which inputs of matrices must be kept until when, and which products are computed more than once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
from jax.extend.core import Literal

from cramjax.compress.watch import matrix_names, to_know, watched_block
from cramjax.model import Stack


@dataclass(frozen=True)
class Reads:
    """What one program reads."""

    known: frozenset[str]
    """Matrices whose inputs it is given, and routers whose choices."""
    matrices: frozenset[str]
    """Those that it multiplies with."""


@lru_cache(maxsize=16)
def programs(stack: Stack, names: tuple[str, ...], sequential: bool) -> tuple[Reads, ...]:
    """The programs of a block, in their order: the inputs of each matrix (or of all), and the stream after the block.

    Args:
        stack: the model.
        names: of the matrices that are visited.
        sequential: one after the other, each given the inputs of those before it.
    """
    if not names:
        return ()
    asked = [(name,) for name in names] if sequential else [names]
    known = [names[:place] for place in range(len(names))] if sequential else [()]
    every = [_reads(stack, own, given) for own, given in zip(asked, known, strict=True)]
    return (*every, _reads(stack, None, names if sequential else ()))


def later(reads: Iterable[Reads]) -> list[frozenset[str]]:
    """After each program, the matrices whose inputs are still read, and the routers whose choices are."""
    left, found = frozenset[str](), []
    for own in reversed(list(reads)):
        found.append(left)
        left |= own.known
    return found[::-1]


def _reads(stack: Stack, asked: tuple[str, ...] | None, known: tuple[str, ...]) -> Reads:
    params = stack.abstract_params()
    block = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params["blocks"])
    tokens = jax.ShapeDtypeStruct((1, min(8, stack.sequence_length)), "int32")

    def seen(block: Any, given: Any, params: Any, tokens: Any) -> Any:
        return watched_block(stack, block, *stack.embed(params, tokens), 0, given)

    def run(block: Any, given: Any, params: Any, tokens: Any) -> Any:
        stream, inputs = seen(block, given, params, tokens)
        return stream if asked is None else to_know({name: inputs[name] for name in asked})

    every = jax.eval_shape(seen, block, {}, params, tokens)[1]
    given = to_know({name: every[name] for name in known})
    traced = jax.make_jaxpr(run)(block, given, params, tokens).jaxpr
    read = _live(traced)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path((block, given))[0]]
    found = [path for path, variable in zip(paths, traced.invars, strict=False) if variable in read]
    names = set(matrix_names(stack))
    named = [(path[0].idx, jax.tree_util.keystr(path[1:], simple=True, separator="/")) for path in found]
    return Reads(
        frozenset(path[1].key for path in found if path[0].idx == 1),
        frozenset(name for part, name in named if part == 0 and name in names),
    )


def _live(traced: Any) -> set[Any]:
    """Variables that what a trace gives depends on."""
    live = {variable for variable in traced.outvars if not isinstance(variable, Literal)}
    for equation in reversed(traced.eqns):
        if equation.effects or any(variable in live for variable in equation.outvars):
            live |= {variable for variable in equation.invars if not isinstance(variable, Literal)}
    return live
