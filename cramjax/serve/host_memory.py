"""Memory of a process that decodes on a CPU: weights in large pages, and what is freed given back.

Read in pages of 4 KiB, weights of 135M parameters in 8 bits took 1.2 times as long a token: what is read from end to
end waits for addresses. And a process held 30 to 60 MiB of freed pools, for glibc takes blocks of up to 32 MiB for
small ones as soon as one such is freed.
"""

import ctypes
import os
import sys
from collections.abc import Iterable

import jax

_PAGE = 2 << 20
_HUGEPAGE, _COLLAPSE = 14, 25
"""Advice to Linux (madvise): that an address range is to have large pages, and that it is to have them now."""
_MMAP_THRESHOLD = -3
"""Glibc's number (mallopt) for the bytes from which on a block is one of its own, and given back when freed."""
_BLOCK = 4 << 20


def give_back_blocks() -> None:
    """Let this process give blocks of some MiB back when they are freed, unless its environment says otherwise."""
    said = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and not said:
        adjust = getattr(ctypes.CDLL(None), "mallopt", None)  # other libraries than glibc have none
        if adjust is not None:
            adjust(_MMAP_THRESHOLD, _BLOCK)


def lay_out(arrays: Iterable[jax.Array]) -> None:
    """Move what arrays of this machine's memory hold to large pages, where the system has them; nothing else changes.

    Args:
        arrays: on a CPU. Those of less than a few pages are left where they are.
    """
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for array in arrays:
        if array.nbytes < 2 * _PAGE or not array.is_fully_addressable or len(array.devices()) != 1:
            continue
        begin = array.unsafe_buffer_pointer()
        first = -(-begin // _PAGE) * _PAGE
        length = (begin + array.nbytes - first) // _PAGE * _PAGE
        # A system without large pages says no, and has lost nothing.
        if length > 0 and advise(first, length, _HUGEPAGE) == 0:
            advise(first, length, _COLLAPSE)
