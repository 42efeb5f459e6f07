"""Cleans documents: normalises them, drops the too short and the repeated, and counts what every stage dropped.

Sits between `sources` and the tokenizer. Memory does not grow with the corpus beyond a fixed table of digests.
"""

import hashlib
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cramjax.config import DataConfig
from cramjax.data.files import Document

SLOTS_MAX = 1 << 25
"""Most slots of the digest table: 256 MiB, enough for 25 million documents."""

STAGES = ("read", "short", "duplicate", "incompressible")


@dataclass(frozen=True)
class CleanDocument:
    """A document that is kept.

    Args:
        text: Normalised text.
        utf8: The same as UTF-8.
        number: Its place among all documents read, from 0.
        continues: Whether it goes on from document `number - 1` with no boundary between them.
        draw: Uniform in [0, 1), decided by the text alone; splits are made with it.
    """

    text: str
    utf8: bytes
    number: int
    continues: bool
    draw: float


@dataclass
class Tally:
    """Documents and their characters and UTF-8 bytes: all that were read, and those each stage dropped."""

    stages: dict[str, dict[str, int]] = field(
        default_factory=lambda: {stage: {"documents": 0, "characters": 0, "bytes": 0} for stage in STAGES}
    )

    def add(self, stage: str, text: str, utf8: bytes) -> None:
        """Count one document at a stage."""
        counts = self.stages[stage]
        counts["documents"] += 1
        counts["characters"] += len(text)
        counts["bytes"] += len(utf8)


class DigestSet:
    """A set of 64-bit digests in an open-addressed table of fixed greatest size.

    Among n documents two different ones collide with probability n²/2⁶⁵ (2 in 100,000 for 25 million). A full table
    answers only for what it holds, and says so in `full`.
    """

    def __init__(self, slots_max: int = SLOTS_MAX):
        """Start empty and grow up to `slots_max` slots of 8 bytes, a power of two."""
        self._slots_max = slots_max
        self._table = array("Q", bytes(8 * min(1 << 12, slots_max)))
        self._count = 0
        self.full = False

    def add(self, digest: int) -> bool:
        """Add a digest; true if it was not there. A digest of zero is stored as one."""
        digest = digest or 1
        slot = self._find(self._table, digest)
        if self._table[slot] == digest:
            return False
        if 4 * self._count >= 3 * len(self._table):
            if len(self._table) >= self._slots_max:
                self.full = True
                return True
            self._grow()
            slot = self._find(self._table, digest)
        self._table[slot] = digest
        self._count += 1
        return True

    def _grow(self) -> None:
        larger = array("Q", bytes(16 * len(self._table)))
        for digest in self._table:
            if digest:
                larger[self._find(larger, digest)] = digest
        self._table = larger

    @staticmethod
    def _find(table: "array[int]", digest: int) -> int:
        mask = len(table) - 1
        slot = digest & mask
        while table[slot] not in (0, digest):
            slot = (slot + 1) & mask
        return slot


def normalize(text: str, form: str) -> str:
    """Unicode normalisation as in `DataConfig.normalize`.

    Args:
        text: Any text.
        form: `none`, `nfc`, `nfkc`, or `ascii_lower` (decomposed, lower-cased, non-ASCII dropped; Geiping & Goldstein
            2022, section 4.4).
    """
    if form == "ascii_lower":
        return unicodedata.normalize("NFD", text).encode("ascii", "ignore").decode().lower()
    if form == "none" or text.isascii():
        return text
    return unicodedata.normalize("NFC" if form == "nfc" else "NFKC", text)


def clean(
    documents: Iterable[Document], data: DataConfig, seen: DigestSet, tally: Tally, *, filtered: bool = True
) -> Iterator[CleanDocument]:
    """Normalise documents, and drop those too short or seen before.

    Args:
        documents: As read.
        data: Says how.
        seen: Digests of earlier documents; those of this pass are added to it.
        tally: Counts documents under `read`, `short` and `duplicate`.
        filtered: Whether to drop anything. Given validation text is kept whole.
    """
    for number, document in enumerate(documents):
        text = normalize(document.text, data.normalize)
        try:
            utf8 = text.encode()
        except UnicodeEncodeError:  # Half a surrogate pair, from a JSON escape: not text in any encoding.
            utf8 = text.encode("utf-8", "replace")
            text = utf8.decode()
        tally.add("read", text, utf8)
        digest = hashlib.blake2b(utf8, digest_size=16).digest()
        new = seen.add(int.from_bytes(digest[:8], "little")) if data.deduplicate else True
        if filtered and len(text.strip()) < data.min_chars:
            tally.add("short", text, utf8)
        elif filtered and not new:
            tally.add("duplicate", text, utf8)
        else:
            yield CleanDocument(text, utf8, number, document.continues, int.from_bytes(digest[8:], "little") / 2**64)
