"""Which pages of the pool belong to whom, and which hold the beginnings of texts that may come again. No device in it.

Source: vLLM's automatic prefix caching: full pages are known by a hash of all that stands before and in them, are
shared by counting references, and, when nobody has them, stay known until they are needed for something else.
"""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

NOBODY = 0
"""The page that no row owns: what the tables of short rows point to."""


def page_keys(tokens: Sequence[int], size: int, salt: bytes = b"") -> list[bytes]:
    """The keys of a text's full pages: each a hash of the one before it and of its own tokens.

    Args:
        tokens: the text.
        size: tokens of a page.
        salt: what else keys and values depend on; goes into the first key.
    """
    keys, before = [], salt
    ids = np.asarray(tokens, np.int32)
    for start in range(0, len(ids) - size + 1, size):
        before = hashlib.sha256(before + ids[start : start + size].tobytes()).digest()
        keys.append(before)
    return keys


class PagePool:
    """Who has which pages. Page 0 is nobody's."""

    def __init__(self, pages: int, size: int):
        """`pages` of `size` tokens each, page 0 among them."""
        self.size = size
        self.pages = pages
        self._references = [0] * pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, pages))  # longest unused first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self.queried = 0
        """Pages of texts that began, which were looked for among the known ones."""
        self.found = 0
        """Those of them that were there."""

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._free)

    def take(self, number: int) -> list[int] | None:
        """So many pages, whatever they held is forgotten; None, and nothing is changed, if there are not so many."""
        if number > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(number)]
        for page in taken:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]
            self._references[page] = 1
        return taken

    def begin(self, keys: Sequence[bytes], number: int) -> tuple[list[int], list[int]] | None:
        """Pages for a text; None, and nothing is changed, if there are not so many.

        Args:
            keys: of its beginning.
            number: of pages in all, as many as there are keys or more.

        Returns:
            The pages of the longest beginning that is known, and new ones for the rest.
        """
        found = [self._page_of[key] for key in itertools.takewhile(self._page_of.__contains__, keys)]
        if number - len(found) > self.free - sum(page in self._free for page in found):
            return None
        self.queried += len(keys)
        self.found += len(found)
        self.share(found)
        return found, self.take(number - len(found)) or []

    def share(self, pages: Sequence[int]) -> None:
        """Someone more has these pages, which someone had or which are known."""
        for page in pages:
            self._free.pop(page, None)
            self._references[page] += 1

    def know(self, page: int, key: bytes) -> None:
        """A full page holds what its key says. If another one does too, that one stays the known one."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Someone has these pages no longer. Of a text's known pages the last ones are forgotten first."""
        for page in reversed(pages):
            if self._references[page] < 1:
                raise ValueError(f"page {page} is nobody's.")
            self._references[page] -= 1
            if not self._references[page]:
                self._free[page] = None
                if page not in self._key_of:
                    self._free.move_to_end(page, last=False)

    def check(self) -> None:
        """Raise AssertionError if what it keeps contradicts itself."""
        held = {page for page, count in enumerate(self._references) if count}
        assert NOBODY not in held and NOBODY not in self._free
        assert held.isdisjoint(self._free) and len(held) + len(self._free) == self.pages - 1
        assert all(count >= 0 for count in self._references)
        assert {page: key for key, page in self._page_of.items()} == self._key_of
