"""Tile sizes of the attention kernels: a pure function of what is computed and of the GPU's generation."""

from dataclasses import dataclass

# Shared memory that one block of threads may ask for, in bytes, by compute capability (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability").
SHARED_MEMORY = {
    "8.0": 163 << 10,
    "8.6": 99 << 10,
    "8.7": 163 << 10,
    "8.9": 99 << 10,
    "9.0": 227 << 10,
    "10.0": 227 << 10,
    "10.3": 227 << 10,
    "12.0": 99 << 10,
    "12.1": 99 << 10,
}


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work."""

    block_q: int
    """Queries held at once; a power of two, at least 16."""
    block_k: int
    """Keys held at once; likewise."""
    warps: int
    """Warps of 32 threads that share a tile."""
    stages: int
    """Iterations of the inner loop whose loads are in flight together."""


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dkv: Tile


def choose_tiles(head_dim: int, itemsize: int, capability: str) -> Tiles:
    """The tiles of a problem.

    Args:
        head_dim: width of a head, padded to a power of two.
        itemsize: bytes of an element of the operands.
        capability: CUDA compute capability, a key of `SHARED_MEMORY`.
    """
    row, limit = head_dim * itemsize, SHARED_MEMORY[capability]
    return Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
