"""The walk that compresses: a block at a time is on the device, and what it became feeds the next.

The residual stream of all calibration sequences, before the block, is in host memory, in microbatches; so are the
inputs of the block's matrices while it is worked on. Hessians are summed in float32.
"""

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from cramjax.compiling import jit
from cramjax.compress import hessian
from cramjax.compress.reads import Reads, later, programs
from cramjax.compress.watch import Inputs, matrix_names, to_know, watched_block
from cramjax.errors import ModelError
from cramjax.model import Stack
from cramjax.model.layers import Context

Visit = Callable[[str, Array, "Array | None"], tuple[Any, Array]]
"""`(name, matrix, Hessian) -> (leaf, array)`: what becomes of a matrix, and the same as an array. Of a block's experts,
all have an axis of these first."""


_BATCH_TOKENS = 8192


def microbatch(asked: int | None, length: int) -> int:
    """Sequences that are on the device at once.

    Args:
        asked: what the configuration says.
        length: tokens of each.
    """
    return asked or max(1, _BATCH_TOKENS // length)


@dataclass(frozen=True)
class Calibration:
    """Sequences on their way through the stack, in host memory, by microbatch."""

    streams: list[np.ndarray]
    """(batch, stream, embed) each."""
    contexts: list[list[np.ndarray]]
    """Arrays of what blocks read beside it."""
    structure: Any
    """Of a `Context`."""

    def after(self, streams: list[np.ndarray]) -> "Calibration":
        """The same further on."""
        return replace(self, streams=streams)

    def on(self, device: Any) -> Iterator[tuple[Array, Context]]:
        """Each microbatch's stream and context, on a device."""
        for stream, arrays in zip(self.streams, self.contexts, strict=True):
            x, *own = jax.device_put([stream, *arrays], device)
            yield x, self.structure.unflatten(own)


@dataclass(frozen=True)
class BlockWalk:
    """Visits to the matrices of one block after the other."""

    stack: Stack
    device: Any
    sequential: bool = True
    """Whether a matrix is calibrated on what those before it in its block became."""
    only: str = "*"
    """Pattern of the names of matrices that are visited."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of a block's matrices, in the order that they are read in."""
        return tuple(name for name in matrix_names(self.stack) if fnmatch.fnmatchcase(name, self.only))

    @cached_property
    def programs(self) -> tuple[Reads, ...]:
        """What is run of a block."""
        return programs(self.stack, self.names, self.sequential)

    def begin(self, params: PyTree, tokens: Int[np.ndarray, "sequences seq"], batch: int) -> Calibration:
        """The start of the walk.

        Args:
            params: with the embedding.
            tokens: of the calibration sequences.
            batch: sequences of a microbatch.
        """
        embedding = {"embed": self._put(params["embed"])}
        streams, contexts, structure = [], [], None
        for start in range(0, len(tokens), batch):
            x, context = _embed(self.stack)(embedding, self._put(tokens[start : start + batch]))
            arrays, structure = jax.tree.flatten(context)
            streams.append(np.asarray(x))
            contexts.append([np.asarray(array) for array in arrays])
        return Calibration(streams, contexts, structure)

    def visit(
        self, block: PyTree, repeat: int, calibration: Calibration | None, visit: Visit
    ) -> tuple[dict[str, Any], Calibration | None]:
        """Compress the matrices of one block.

        Args:
            block: its parameters, in host memory.
            repeat: which step of the walk it is.
            calibration: before it; None: matrices are visited without Hessians.
            visit: compresses a matrix.

        Returns:
            The leaves in the matrices' places by their names, and the calibration after the block.

        Raises:
            ModelError: inputs of a matrix are not finite.
        """
        leaves: dict[str, Any] = {}
        if calibration is None:
            for name in self.names:
                leaves[name], _ = visit(name, self._put(_at(block, name)), None)
            return leaves, None
        own, known = self._put(block), [{} for _ in calibration.streams]
        groups = [(name,) for name in self.names] if self.sequential else [self.names]
        for names, needed in zip(groups, later(self.programs), strict=False):  # the last one gives the stream
            hessians = self._hessians(own, repeat, calibration, known, names, needed)
            for name in names:
                leaves[name], array = visit(name, _at(own, name), hessians.pop(name))
                own = _with(own, name, array)
        streams = []
        for (x, context), inputs in zip(calibration.on(self.device), known, strict=True):
            streams.append(np.asarray(_output(self.stack)(own, x, context, repeat, self._put(inputs))))
        return leaves, calibration.after(streams)

    def _hessians(
        self,
        block: PyTree,
        repeat: int,
        calibration: Calibration,
        known: Sequence[dict[str, np.ndarray]],
        names: tuple[str, ...],
        needed: frozenset[str],
    ) -> dict[str, Float[Array, "*experts inner inner"]]:
        """Means of the outer products of some matrices' inputs, of experts' over all rows there are. Of the inputs that
        are known then, those that are needed stay.
        """
        sums: dict[str, Array] = {}
        count = 0
        for (x, context), inputs in zip(calibration.on(self.device), known, strict=True):
            found = _inputs(self.stack, names)(block, x, context, repeat, self._put(inputs))
            sums = hessian.added(sums or {name: hessian.empty(own) for name, own in found.items()}, found)
            count += x.shape[0] * x.shape[1]
            inputs |= {name: np.asarray(own) for name, own in to_know(found).items() if name in needed}
            for name in inputs.keys() - needed:
                del inputs[name]
        for name, total in sums.items():  # an input that is not finite makes its own square no number, or endless
            if not bool(jnp.isfinite(jnp.diagonal(total, axis1=-2, axis2=-1)).all()):
                raise ModelError(
                    f"block {repeat}: the inputs of {name} are not finite in {self.stack.compute_dtype}: mend the "
                    "model, or calibrate on other text."
                )
        return {name: hessian.means(sums.pop(name), np.float32(count)) for name in names}

    def _put(self, tree: PyTree) -> PyTree:
        return jax.device_put(tree, self.device)


@lru_cache(maxsize=16)
def _embed(stack: Stack) -> Callable[..., tuple[Array, Context]]:
    """The program that starts the walk."""
    return jit(stack.embed)


@lru_cache(maxsize=64)
def _inputs(stack: Stack, names: tuple[str, ...]) -> Callable[..., dict[str, Inputs]]:
    """The program that computes the inputs of some matrices of a block, and no more than that takes."""

    def inputs(
        block: PyTree, x: Array, context: Context, repeat: Array, known: Mapping[str, Array]
    ) -> dict[str, Inputs]:
        seen = watched_block(stack, block, x, context, repeat, known)[1]
        return {name: seen[name] for name in names}

    return jit(inputs)


@lru_cache(maxsize=16)
def _output(stack: Stack) -> Callable[..., Array]:
    """The program that computes the residual stream after a block."""

    def output(block: PyTree, x: Array, context: Context, repeat: Array, known: Mapping[str, Array]) -> Array:
        return watched_block(stack, block, x, context, repeat, known)[0]

    return jit(output)


def _at(block: PyTree, name: str) -> Any:
    for key in name.split("/"):
        block = block[key]
    return block


def _with(block: PyTree, name: str, leaf: Any) -> PyTree:
    key, _, rest = name.partition("/")
    return {**block, key: _with(block[key], rest, leaf) if rest else leaf}
