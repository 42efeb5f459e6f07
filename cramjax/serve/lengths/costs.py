"""What batches cost: seconds by a buffer's shape, from a table that is measured once, or from FLOPs where none is.

The table has the latency of padded batches by length and number of texts. It is kept in the cache directory, for a
model, a machine and a version of jax. Between its entries, and for buffers without padding, what was measured is to
what FLOPs say as it is nearby.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from cramjax.cache import cache_directory, prune, write_atomically
from cramjax.compiling import BRIEF, jit
from cramjax.devices import describe, undisturbed
from cramjax.language_model import LanguageModel
from cramjax.model import Model, count_parameters
from cramjax.model.ragged import Ragged, ragged
from cramjax.serve.lengths.shapes import Shape, shape_of
from cramjax.start import start

_CALL = 0.02
"""Seconds that a batch takes beside its products: most of them a share of its program's compilation."""
_SPEED = 1e11
"""FLOP/s of products; only what it makes of a batch beside `_CALL` matters."""
_PAIRS = 4.0
"""How much slower the products of attention are, with their softmax: few tokens long and a head wide."""

_LENGTHS, _TEXTS = (32, 128, 512), (1, 4, 16, 64)
_MOST_PLACES = 4096
"""Of a batch that is measured."""
_RUNS = 3
MEASURING_PAYS = 1 << 20
"""Tokens from which on the table is measured for them: fifty times as many as it takes."""
_CACHE_BYTES = 1 << 20


@dataclass(frozen=True)
class Table:
    """Latencies that were measured."""

    lengths: tuple[int, ...]
    texts: tuple[int, ...]
    seconds: tuple[tuple[float | None, ...], ...]
    """By length, and by number of texts; None: too large a batch."""


@dataclass(frozen=True)
class Costs:
    """Seconds of batches under one model."""

    context: int
    """Most tokens of a text."""
    place_flops: float
    """FLOPs of a place in all products but attention's."""
    pair_flops: float
    """FLOPs of a pair of query and key in all layers."""
    table: Table | None = None

    def of_shape(self, shape: Shape) -> Float[np.ndarray, "*batches"]:
        """Seconds of a buffer of a shape."""
        products = self.place_flops * np.asarray(shape.places) + _PAIRS * self.pair_flops * np.asarray(shape.pairs)
        seconds = _CALL + products / _SPEED
        return seconds if self.table is None else seconds * self._measured_share(shape)

    def seconds(
        self,
        longest: Int[np.ndarray, "*batches"],
        texts: Int[np.ndarray, "*batches"],
        tokens: Int[np.ndarray, "*batches"],
    ) -> Float[np.ndarray, "*batches"]:
        """Seconds of batches; infinity for several texts that are too many."""
        shape = shape_of(longest, texts, tokens, self.context)
        return np.where(shape.fits | (np.asarray(texts) == 1), self.of_shape(shape), np.inf)

    def _measured_share(self, shape: Shape) -> Float[np.ndarray, "*batches"]:
        """What was measured over what FLOPs say: linear between the logarithms of lengths and numbers of texts, and
        beyond the table as at its edge.
        """
        assert self.table is not None, "a table"
        bare, shares = replace(self, table=None), []
        for length, row in zip(self.table.lengths, self.table.seconds, strict=True):
            own: list[float] = []
            for texts, seconds in zip(self.table.texts, row, strict=True):
                said = float(bare.of_shape(Shape(length * texts, texts, length)))
                own.append(own[-1] if seconds is None else seconds / said)
            shares.append(own)
        by_texts = [_between(np.log(np.asarray(shape.rows)), np.log(self.table.texts), own) for own in shares]
        return _between(np.log(np.asarray(shape.longest)), np.log(self.table.lengths), by_texts)


def _between(x: np.ndarray, at: np.ndarray, values: Sequence[Any]) -> np.ndarray:
    """Linear interpolation of values, which may be arrays shaped as `x`, held beyond the ends."""
    found = np.asarray(values[0], np.float64)
    for (low, high), (first, second) in zip(itertools.pairwise(at), itertools.pairwise(values), strict=True):
        found = found + np.clip((x - low) / (high - low), 0, 1) * (np.asarray(second) - np.asarray(first))
    return found


def costs_of(model: LanguageModel, tokens: int = 0) -> Costs:
    """The costs of a model's batches: as measured, where that was done or pays, else by FLOPs.

    What is measured while other processes are in the way is worth less than FLOPs, and is not used.

    Args:
        model: that reads them.
        tokens: that it will read.
    """
    estimated = estimated_costs(model)
    file = _file(model)
    table = _read(file)
    if table is None and tokens >= MEASURING_PAYS:
        table, alone = undisturbed(lambda: measure(model))
        if not alone:
            return estimated
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"lengths": table.lengths, "texts": table.texts, "seconds": table.seconds}))
        prune(file.parent, _CACHE_BYTES)
    return replace(estimated, table=table)


def estimated_costs(model: LanguageModel) -> Costs:
    """The costs of a model's batches by FLOPs."""
    own, sizes = model.model, model.model.sizes
    in_blocks = count_parameters(model.config, own.vocab_size, own.sequence_length).blocks
    pair = 4 * model.config.layers * sizes.heads * sizes.head_dim
    return Costs(model.context, 2.0 * in_blocks, float(pair))


def measure(model: LanguageModel) -> Table:
    """Time padded batches of several lengths and numbers of texts, each the fastest of three after one that compiles.

    A batch takes no longer than one of more or of longer texts: where it did, something was in the way.

    Args:
        model: whose walk is timed.
    """
    lengths = tuple(dict.fromkeys(min(length, model.context) for length in _LENGTHS))

    def seconds(length: int, texts: int) -> float:
        if texts > 1 and length * texts > _MOST_PLACES:
            return np.inf
        rows = np.full((texts, length), model.tokenizer.separator_id).tolist()
        batch = ragged(rows, places=length * texts, rows=texts, longest=length)
        spent = []
        for _ in range(1 + _RUNS):
            began = time.perf_counter()
            jax.block_until_ready(_walk(model.model, model.params, batch))
            spent.append(time.perf_counter() - began)
        return min(spent[1:])

    timed = np.array([[seconds(length, texts) for texts in _TEXTS] for length in lengths])
    for axis in (0, 1):
        timed = np.flip(np.minimum.accumulate(np.flip(timed, axis), axis), axis)
    return Table(
        lengths, _TEXTS, tuple(tuple(each if each < np.inf else None for each in row) for row in timed.tolist())
    )


@partial(jit, seconds=BRIEF, static_argnames="model")
def _walk(model: Model, params: PyTree, texts: Ragged) -> Float[Array, "places embed"]:
    return model.unpadded(params, texts)


def _file(model: LanguageModel) -> Path:
    """Where the table of a model lies, on this machine, with this jax."""
    leaves, structure = jax.tree.flatten(model.params)
    held = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
    said = (
        str(model.model),
        str(structure),
        str(held),
        describe(start()[0]),
        jax.__version__,
        jaxlib.version.__version__,
    )
    return cache_directory() / "batch_costs" / f"{hashlib.sha256(repr(said).encode()).hexdigest()[:16]}.json"


def _read(file: Path) -> Table | None:
    """The table of a file; None where there is none, or it is damaged."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        seconds = tuple(tuple(None if each is None else float(each) for each in row) for row in said["seconds"])
        table = Table(tuple(map(int, said["lengths"])), tuple(map(int, said["texts"])), seconds)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    whole = len(seconds) == len(table.lengths) and {len(row) for row in seconds} == {len(table.texts)}
    return table if whole and all(row[0] is not None and row[0] > 0 for row in seconds) else None
