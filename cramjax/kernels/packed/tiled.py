"""What packed matrices of a few bits per weight have in common: their products, and codes of 4 bits in pairs.

Products are those of the unpacked matrix, rounded to the compute precision; it never exists but for one layer; CPUs
unpack a tile at a time, which stays in their cache.
"""

import abc
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num, UInt8

from cramjax import devices
from cramjax.kernels.dense import matmul, product, transposed
from cramjax.kernels.dense.packed import Packed
from cramjax.kernels.mesh import whole

# With more rows than this, passes over the sums of tiles cost a CPU more than tiles of columns, which lie apart.
_FEW_ROWS = 128
# Bytes of an unpacked tile, to be read again from a CPU's cache.
_TILE = 4 << 20


class Tiled(Packed):
    """A constant matrix whose parts, cut alike along an axis of the matrix, are those of a tile of it."""

    @property
    @abc.abstractmethod
    def pieces(self) -> int:
        """Stretches of the inputs that can be tiles."""

    @abc.abstractmethod
    def repacked(self, w: Float[Array, "*stack inner outer"]) -> "Tiled":
        """Another matrix of this shape, packed as this one is."""

    def cuttable(self) -> "Tiled":
        """The same matrix, if need be in other parts, of which `tile` can be cut."""
        return self

    def tile(self, index: Any, tiles: int, axis: int) -> "Tiled":
        """One of so many equal tiles of one matrix, along its inputs (whole pieces of them) or its outputs."""

        def cut(part: Array) -> Array:
            count = part.shape[axis] // tiles
            return jax.lax.dynamic_slice_in_dim(part, index * count, count, axis)

        return jax.tree.map(cut, self)

    def multiply(self, x: Float[Array, "rows inner"], dtype: DTypeLike) -> Float[Array, "rows outer"]:
        """The product of rows with the matrix; see `Packed.multiply`."""
        return _multiply(jnp.dtype(dtype), x.astype(dtype), self)


def paired(codes: UInt8[Array, "inner outer"]) -> UInt8[Array, "half outer"]:
    """Codes from 0 to 15, two in a byte: that of an even row in the low bits, and that of the row after it in the high
    ones.
    """
    pairs = codes.reshape(-1, 2, codes.shape[-1])
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpaired(pairs: UInt8[Array, "*stack half outer"]) -> UInt8[Array, "*stack inner outer"]:
    """The codes of `paired`, one each."""
    *lead, half, outer = pairs.shape
    shifts = jnp.asarray([[0], [4]], jnp.uint8)
    return ((pairs[..., None, :] >> shifts) & jnp.uint8(15)).reshape(*lead, 2 * half, outer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(dtype: Any, x: Array, w: Tiled) -> Array:
    x, w = _gathered(x, w)
    inner, outer = w.shape
    if len(x) <= _FEW_ROWS and (tiles := _tiles(w, w.pieces)) > 1:
        width = inner // tiles

        def add(index: Any, total: Array) -> Array:
            columns = jax.lax.dynamic_slice_in_dim(x, index * width, width, axis=1)
            return total + matmul(columns, w.tile(index, tiles, 0).unpacked().astype(dtype))

        return jax.lax.fori_loop(0, tiles, add, jnp.zeros((len(x), outer), jnp.float32)).astype(dtype)
    return _beside(_tiles(w, outer), lambda tile: product(x, tile.unpacked().astype(dtype), dtype), w, 1)


def _forward(dtype: Any, x: Array, w: Tiled) -> tuple[Array, Tiled]:
    return _multiply(dtype, x, w), w


def _backward(dtype: Any, w: Tiled, g: Num[Array, "rows outer"]) -> tuple[Array, None]:
    g, w = _gathered(g, w)
    tiles = _tiles(w, w.pieces)
    return _beside(tiles, lambda tile: product(g, transposed(tile.unpacked().astype(dtype)), dtype), w, 0), None


_multiply.defvjp(_forward, _backward)


def _gathered(x: Array, w: Tiled) -> tuple[Array, Tiled]:
    """Rows, and the matrix they are to be multiplied with, still packed: each device unpacks it for itself.

    It waits for the rows: a compiler would unpack the matrices of an unrolled stack all at once, and first.
    """
    x, w = jax.lax.optimization_barrier((x, jax.tree.map(whole, w)))
    return x, w.cuttable()


def _beside(tiles: int, multiply: Callable[[Tiled], Array], w: Tiled, axis: int) -> Array:
    """Products with tiles along an axis, side by side. In a loop, for which CPUs' compilers do not unpack ahead."""
    if tiles == 1:
        return multiply(w)
    columns = w.shape[axis] // tiles
    first = jax.eval_shape(lambda: multiply(w.tile(0, tiles, axis)))

    def put(index: Any, result: Array) -> Array:
        own = multiply(w.tile(index, tiles, axis))
        return jax.lax.dynamic_update_slice_in_dim(result, own, index * columns, axis=1)

    empty = jnp.zeros((first.shape[0], w.shape[axis]), first.dtype)
    return jax.lax.fori_loop(0, tiles, put, empty)


def _tiles(w: Tiled, pieces: int) -> int:
    """Tiles of whole pieces that a CPU unpacks a matrix in: the fewest, of equal size, that its cache holds one of."""
    if devices.target().platform != "cpu":
        return 1
    size = 4 * math.prod(w.shape)
    fitting = (n for n in range(1, pieces) if pieces % n == 0 and size <= n * _TILE)
    return next(fitting, pieces)
