"""Who is in: what the next call computes, decided from numbers alone."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Held:
    """A request in a slot."""

    number: int
    length: int
    """Tokens of prompt and text so far."""
    computed: int
    """Of these, tokens that are held."""
    pages: int
    """Pages that it has."""
    room: int
    """Tokens that may be drawn yet."""

    @property
    def left(self) -> int:
        """Tokens to be read before it can draw."""
        return self.length - self.computed


@dataclass(frozen=True)
class Steps:
    """Tokens to be drawn for each of some requests, or who must give its pages up for it."""

    steps: int
    preempted: int | None
    """A request that gives way; then all is planned anew. None: nobody does."""


def pages_for(tokens: int, size: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // size)


def pages_missing(row: Held, steps: int, size: int) -> int:
    """Pages of `size` tokens that a request needs before it draws so many tokens, or as many as it may."""
    return max(pages_for(row.computed + min(steps, row.room), size) - row.pages, 0)


def plan_steps(drawing: Sequence[Held], others: Sequence[Held], free: int, size: int, most: int) -> Steps:
    """How far those that draw can go.

    Where the pages do not suffice for one token each, the newest request gives its own up, and is computed again later.
    How many become free is seen when it has: of pages that others have too, none do.

    Args:
        drawing: requests that draw.
        others: requests that have pages and do not.
        free: pages that nobody has.
        size: tokens of a page.
        most: tokens that each may draw in one call.
    """
    steps = min(most, max((row.room for row in drawing), default=0))

    def needed(steps: int) -> int:
        return sum(pages_missing(row, steps, size) for row in drawing)

    while steps > 1 and needed(steps) > free:
        steps //= 2
    everyone = [row.number for row in (*drawing, *others)]
    return Steps(steps, max(everyone) if len(everyone) > 1 and needed(steps) > free else None)


def plan_pieces(
    rows: Sequence[Held], shapes: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Which pieces of which prompts are read together.

    Args:
        rows: requests with something to be read, in the order in which they are to be served.
        shapes: (rows, tokens of each) that a call can have.

    Returns:
        The shape, and (number, tokens) of each piece. It is the shape that reads most real tokens of those that waste
        least, the first request always among them.
    """
    best: tuple[float, tuple[int, int], list[tuple[int, int]]] | None = None
    for shape in shapes:
        many, long = shape
        pieces = [(row.number, min(row.left, long)) for row in rows[:many]]
        real = sum(count for _, count in pieces)
        # A call costs as its padded tokens, and about as much as 16 of them besides.
        value = real / (many * long + 16)
        if best is None or value > best[0]:
            best = value, shape, pieces
    assert best is not None
    return best[1], best[2]
