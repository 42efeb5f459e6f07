"""Weights where they lie, and those of the stages to come on their way to the device.

A model's files are read once, from end to end, to check them and to put each leaf in its place; what stays on the disk
in the precision that it is stored in is read from there. A reader then keeps ahead of the walk as far as a ring of
memory lets it.
"""

import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from cramjax.errors import ModelError
from cramjax.formats.tensors import Extent
from cramjax.language_model.directory import StoredModel
from cramjax.serve.offload.layout import TABLE, Layout, Leaf, Stage, hold, joined, nested, parts_of, path_in
from cramjax.serve.offload.place import Placement, Tier
from cramjax.serve.offload.store import Files, Scratch, ScratchFile, aligned, buffer, raw_bytes


@dataclass(frozen=True)
class Weights:
    """All weights: of each leaf arrays on the device, arrays in the host's memory, or extents of files."""

    embed: PyTree
    stages: tuple[Mapping[str, Any], ...]
    """Of each stage of a walk, leaves by their paths in its programs."""
    tiers: tuple[Mapping[str, Tier], ...]
    table: Any
    """The embedding's table, wherever it is."""
    files: Files

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """The table's rows of tokens, of any shape."""
        ids, at = np.unique(tokens, return_inverse=True)
        if isinstance(self.table, Extent):
            width = self.table.shape[1:]
            found = np.empty((len(ids), *width), self.table.dtype)
            size = found[:1].nbytes
            for row, number in zip(found, ids.tolist(), strict=True):
                extent = Extent(self.table.file, self.table.start + number * size, width, self.table.dtype)
                self.files.read(extent, raw_bytes(row))
        else:
            found = np.asarray(self.table[ids])
        return found[at].reshape(*tokens.shape, *found.shape[1:])


def read_weights(
    stored: StoredModel,
    layout: Layout,
    placement: Placement,
    scratch: Scratch | None,
    *,
    device: Any,
    tell: Callable[[str], object] | None = None,
) -> Weights:
    """Read a model's files once, and put each leaf where it is to lie.

    Args:
        stored: the model.
        layout: its stages.
        placement: the tier of each leaf.
        scratch: for leaves on the disk that are held otherwise than they are stored; None: there are none.
        device: that computes.
        tell: is told how far it is.

    Raises:
        ModelError: a file is damaged.
        RunError: the disk is full.
    """
    checks, files = _Checksums(stored), Files()
    places = len(stored.model.model.period)
    rewritten = [
        leaf
        for stage in layout.walked
        for leaf in stage.leaves
        if placement.tiers[stage.name, leaf.path] == "disk" and not _in_place(stored, leaf)
    ]
    if layout.table is not None and placement.table == "disk" and not _in_place(stored, layout.table):
        rewritten.append(layout.table)
    file = None
    if rewritten:
        assert scratch is not None, "there is a place for what is held otherwise than it is stored"
        file = scratch.file("weights", sum(leaf.bytes for leaf in rewritten))
    at = 0

    def put(leaf: Leaf, tier: Tier) -> Any:
        nonlocal at
        arrays = {name: checks.read(name, leaf.repeat) for name in parts_of(stored, leaf)}
        if tier == "disk" and _in_place(stored, leaf):
            (name,) = arrays
            return (
                stored.dense.files.all_of(name) if leaf.repeat is None else stored.dense.files.part(name, leaf.repeat)
            )
        made = jax.tree.map(np.asarray, _holding(leaf.held)(joined(stored, leaf, arrays)))
        del arrays
        if tier == "device":
            return jax.device_put(jax.tree.map(_own, made), device, may_alias=True)
        if tier == "host":
            return jax.tree.map(_own, made)
        assert file is not None
        tree, at = _written(file, at, made)
        return tree

    def stage(own: Stage) -> dict[str, Any]:
        if tell is not None:
            tell(f"reading {own.name}" + (f" of {len(layout.blocks)}" if own.name.startswith("block") else ""))
        return {
            path_in(own, leaf, places): put(leaf, placement.tiers.get((own.name, leaf.path), "device"))
            for leaf in own.leaves
        }

    embed = nested(stage(layout.embed))
    own = None if layout.table is None else put(layout.table, placement.table)
    walked = tuple(map(stage, layout.walked))
    checks.finish()
    tiers: tuple[Mapping[str, Tier], ...] = tuple(
        {path_in(own, leaf, places): placement.tiers[own.name, leaf.path] for leaf in own.leaves}
        for own in layout.walked
    )
    return Weights(embed, walked, tiers, walked[-1][TABLE] if layout.table is None else own, files)


def _in_place(stored: StoredModel, leaf: Leaf) -> bool:
    """Whether a leaf on the disk is read from the model's own files."""
    names = list(parts_of(stored, leaf))
    return leaf.held is None and len(names) == 1 and names[0] not in stored.dense.sparse


def _holding(held: Any) -> Callable[[Any], Any]:
    return partial(hold, held)


def _own(array: np.ndarray) -> np.ndarray:
    """The array in aligned memory of its own."""
    if array.ctypes.data % 64 == 0 and array.flags.owndata and array.flags.c_contiguous:
        return array
    out = buffer(array.nbytes).view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def _written(file: ScratchFile, start: int, leaf: Any) -> tuple[Any, int]:
    """Write a leaf's arrays from a byte on; their extents, and the byte after them."""
    flat, structure = jax.tree.flatten(leaf)
    extents = []
    for array in flat:
        file.write(start, array)
        extents.append(Extent(file.path, start, array.shape, array.dtype))
        start += aligned(array.nbytes)
    return jax.tree.unflatten(structure, extents), start


_AHEAD = 2
"""Stages that are asked for before the walk is there."""


class _Checksums:
    """Stored arrays read a part at a time, in order, and compared with what was written when the last part is read."""

    def __init__(self, stored: StoredModel):
        self._tensors, self._running = stored.dense, dict[str, int]()

    def read(self, name: str, repeat: int | None) -> np.ndarray:
        if name in self._tensors.sparse and repeat is not None:
            return self._tensors.read_part(name, repeat)
        files = self._tensors.files
        array = files.read(name) if repeat is None else files.read_part(name, repeat)
        if repeat is not None:
            self._running[name] = zlib.crc32(raw_bytes(array).data, self._running.get(name, 0))
        return array

    def finish(self) -> None:
        """Compare.

        Raises:
            ModelError: bytes are not those that were written.
        """
        for name, found in self._running.items():
            if self._tensors.files.checksums.get(name, found) != found:
                raise ModelError(
                    f"{self._tensors.file(name)} is damaged: the bytes of the tensor {name} are not those that were "
                    "written. Copy it again, or make the model again."
                )


class Coming:
    """The parameters of stages in the order in which a walk asks for them, read ahead as far as there is memory.

    Args:
        weights: where they lie.
        ring: bytes of memory for what comes from the disk.
        reader: runs reads one after the other; one that runs them at once reads nothing ahead.
        device: that computes.
        ahead: whether to read before a stage is asked for.
    """

    def __init__(self, weights: Weights, ring: int, reader: Executor, device: Any, *, ahead: bool):
        self._weights, self._reader, self._device, self._ahead = weights, reader, device, ahead
        self._memory = buffer(ring)
        self._order: deque[int] = deque()
        self._asked: deque[tuple[Future[PyTree], int, int]] = deque()  # and where its memory begins and ends
        self._held: deque[tuple[int, int]] = deque()

    def expect(self, stages: Sequence[int]) -> None:
        """Say which stages will be asked for next, in order."""
        self._order.extend(stages)
        if self._ahead:
            self._ask()

    def take(self) -> PyTree:
        """The parameters of the next stage; they stay until `release`."""
        if not self._asked:
            self._ask(most=1)
        made, start, stop = self._asked.popleft()
        self._held.append((start, stop))
        return made.result()

    def release(self) -> None:
        """Give back the memory of the oldest stage taken: no computation reads it any more."""
        self._held.popleft()
        if self._ahead:
            self._ask()

    def forget(self) -> None:
        """Expect nothing any more: what has been asked for is waited for, and dropped."""
        self._order.clear()
        while self._asked:
            self._asked.popleft()[0].result()

    def _ask(self, most: int = _AHEAD) -> None:
        while self._order and len(self._asked) < most:
            stage = self._order[0]
            size = self._size(stage)
            start = self._room(size)
            if start is None:
                return
            self._order.popleft()
            future = self._reader.submit(self._read, stage, self._memory[start : start + size])
            self._asked.append((future, start, start + size))

    def _size(self, stage: int) -> int:
        return sum(
            aligned(extent.bytes)
            for leaf in self._weights.stages[stage].values()
            for extent in jax.tree.leaves(leaf)
            if isinstance(extent, Extent)
        )

    def _room(self, size: int) -> int | None:
        """Where so many bytes can be read to: after those in use, or from the beginning; None: not yet."""
        asked = [(start, stop) for _, start, stop in self._asked]
        used = [(start, stop) for start, stop in (*self._held, *asked) if stop > start]
        if not size or not used:
            return 0
        first, (newest, last) = used[0][0], used[-1]
        if newest < first:  # they begin again before the oldest
            return last if last + size <= first else None
        if last + size <= len(self._memory):
            return last
        return 0 if size <= first else None

    def _read(self, stage: int, memory: np.ndarray) -> PyTree:
        at = 0

        def arrived(extent: Any) -> Any:
            nonlocal at
            if not isinstance(extent, Extent):
                return extent
            out = memory[at : at + extent.bytes]
            self._weights.files.read(extent, out)
            at += aligned(extent.bytes)
            return out.view(extent.dtype).reshape(extent.shape)

        own, tiers = self._weights.stages[stage], self._weights.tiers[stage]
        here = {path: jax.tree.map(arrived, leaf) for path, leaf in own.items()}
        return nested(
            {
                path: leaf if tiers[path] == "device" else jax.device_put(leaf, self._device, may_alias=True)
                for path, leaf in here.items()
            }
        )
