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


# By bytes of an element and width of a head (padded to a power of two). Chosen from what compiles without spilling
# registers, for sm_80 (whose code sm_86 and sm_89 share) and sm_90, in 99 KB of shared memory, which every card has.
_TILES = {
    (2, 32): Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (2, 64): Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (2, 128): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    (2, 256): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (4, 32): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2)),
    (4, 64): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2)),
    (4, 128): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    (4, 256): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
}

# Where shared memory is at least 163 KB, larger ones.
_LARGE_TILES = {
    (2, 128): Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    (2, 256): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
}


def choose_tiles(head_dim: int, itemsize: int, capability: str) -> Tiles:
    """The tiles of a problem.

    Args:
        head_dim: width of a head, at most 256.
        itemsize: bytes of an element of the operands, 2 or 4.
        capability: CUDA compute capability, a key of `SHARED_MEMORY`.
    """
    key = itemsize, next(width for width in (32, 64, 128, 256) if head_dim <= width)
    if SHARED_MEMORY[capability] >= 163 << 10 and key in _LARGE_TILES:
        return _LARGE_TILES[key]
    return _TILES[key]
