"""How a tokenizer frames one text, or two, for a model that judges them whole: `[CLS] a [SEP] b [SEP]`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cramjax.data.tokenizer import Tokenizer

Ids = Sequence[int]


@dataclass(frozen=True)
class Frame:
    """Tokens around texts, and the types of all.

    Args:
        begin: Tokens before the first text.
        middle: Between the two; None where there is one text.
        end: After the last.
        types: Of the tokens of `begin`, first text, `middle`, second text and `end`.
    """

    begin: tuple[int, ...]
    middle: tuple[int, ...] | None
    end: tuple[int, ...]
    types: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many tokens it adds."""
        return len(self.begin) + len(self.middle or ()) + len(self.end)

    def around(self, first: Ids, second: Ids = ()) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Ids and types of framed texts."""
        parts = [self.begin, first, self.middle or (), second, self.end]
        ids = np.concatenate([np.asarray(part, np.int64) for part in parts])
        return ids, np.repeat(np.asarray(self.types, np.uint8), [len(part) for part in parts])


def frame_of(tokenizer: Tokenizer, *, pairs: bool) -> Frame:
    """The frame that a tokenizer's own template puts around texts, so that models of others see what they know.

    What it lacks is the separator: before the text for tokenizers of ours, between two texts, and after the last.
    """
    separator = (tokenizer.separator_id,)
    middle = separator if pairs else None
    second = int(pairs)
    if tokenizer.begin_ids is None:
        return Frame(separator, middle, separator, (0, 0, 0, second, second))
    backend = tokenizer.backend
    first, other = (backend.encode(text, add_special_tokens=False).ids for text in ("a", "b"))
    framed = backend.encode("a", "b" if pairs else None)
    ids, types = framed.ids, framed.type_ids
    at = len(tokenizer.begin_ids)
    until = at + len(first)
    if not pairs:
        end = tuple(ids[until:])
        return Frame(tokenizer.begin_ids, None, end or separator, (types[0], types[at], 0, 0, types[-1]))
    then = next(n for n in range(until, len(ids)) if ids[n : n + len(other)] == other)
    between, end = tuple(ids[until:then]), tuple(ids[then + len(other) :])
    kinds = (types[0], types[at], types[until] if between else types[at], types[then], types[-1])
    return Frame(tokenizer.begin_ids, between or separator, end or separator, kinds)


def cut_longest(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens kept of two texts if the longer one, or of equals the second, loses its last until both fit.

    It is what BERT's fine-tuning does (Devlin et al. 2019, code), and `transformers` by `longest_first`.

    Args:
        first: tokens of one.
        second: tokens of the other.
        room: for both together.
    """
    half = room // 2
    if first + second <= room:
        return first, second
    if second <= half:
        return room - second, second
    if first <= room - half:
        return first, room - first
    return room - half, half
