"""Requests on their way, and the batches that they make."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cramjax.model import Model
from cramjax.serve.constraints import words_of
from cramjax.serve.engine.draw import ways
from cramjax.serve.engine.pages import NOBODY
from cramjax.serve.engine.programs import MOST_STEPS, STOPS, Rows
from cramjax.serve.engine.schedule import Held, pages_for
from cramjax.serve.request import Progress, Reason, Request, TokenLogprob
from cramjax.serving import EngineConfig

Listener = Callable[[Progress], None]

_VERIFIED = 8
"""Rows up to which guesses are verified: more of them keep a machine busy without."""


@dataclass(eq=False)
class Task:
    """A request on its way."""

    number: int
    request: Request
    listener: Listener
    tokens: list[int]
    """Prompt and text."""
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """Of the full pages that are known."""
    slot: int = -1
    cached: int | None = None
    """Tokens of the prompt that were there already, when it was first admitted."""
    scored: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt's tokens, until they are handed out."""
    is_scored: bool = False
    """Whether they were."""
    guess_from: int = 0
    """Tokens of prompt and text from which on the next ones are guessed."""
    patience: int = 0
    """Tokens without guesses after the last one in vain."""

    @property
    def drawn(self) -> int:
        """Tokens that it has drawn."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def salt(self) -> bytes:
        """What its keys and values depend on beside its tokens, or are to be told apart by."""
        return self.request.salt.encode()

    @property
    def room(self) -> int:
        """Tokens that it may draw yet."""
        return self.request.max_tokens - self.drawn

    @property
    def scores(self) -> bool:
        """Whether its prompt is still to be scored."""
        wanted = self.request.prompt_logprobs and not self.is_scored
        return wanted and self.computed < len(self.request.prompt)

    @property
    def draws(self) -> bool:
        """Whether it goes on token by token: all but its newest token is held."""
        return len(self.tokens) - self.computed == 1 and self.computed > 0 and self.room > 0 and not self.scores

    def take(self, tokens: Sequence[int]) -> tuple[list[int], Reason | None]:
        """Those of drawn tokens that are its own, and why its text ends with them, if it does."""
        stops, constraint = self.request.stop_tokens, self.request.constraint
        for place, token in enumerate(tokens):
            if constraint is not None and not constraint.take(token):
                return [*tokens[:place]], "stuck"
            if token in stops or (constraint is not None and constraint.is_over):
                return [*tokens[: place + 1]], "stop"
        return [*tokens], None

    def held(self) -> Held:
        """What the schedule is decided from."""
        return Held(self.number, len(self.tokens), self.computed, len(self.pages), self.room)


@dataclass(frozen=True)
class Shapes:
    """The shapes of calls."""

    page: int
    """Tokens of a page."""
    prefill: tuple[tuple[int, int], ...]
    step: tuple[int, ...]
    pages: tuple[int, ...]
    verify: tuple[int, ...] = ()
    """Rows of calls that verify guesses."""

    def widths(self, long: int) -> tuple[int, ...]:
        """Pages that a row can have in calls of so many tokens."""
        return tuple(width for width in self.pages if width * self.page >= long)


def make_shapes(config: EngineConfig, row_pages: int) -> Shapes:
    """The shapes of calls for rows of so many pages: a dozen or two in all."""
    longest = row_pages * config.page

    def reads(*shapes: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        rows = [(min(many, config.slots), min(long, longest)) for many, long in shapes]
        return tuple(dict.fromkeys(rows))

    if config.deterministic:  # one shape: what a row gives does not depend on how many are beside it
        return Shapes(config.page, reads((1, 64)), step=(config.slots,), pages=(row_pages,))
    sizes = [size for size in (1, 4, 16, 64) if size < config.slots]
    pages = tuple(sorted({max(row_pages // 4, 1), row_pages}))
    steps = (*sizes, config.slots)
    verify = tuple(size for size in steps if size <= _VERIFIED) if config.lookup else ()
    return Shapes(config.page, reads((1, 16), (1, 64), (1, 256), (4, 64)), steps, pages, verify)


def make_rows(
    model: Model, shapes: Shapes, tasks: Sequence[Task], read: Sequence[Sequence[int]], shape: tuple[int, int]
) -> Rows:
    """The batch of a call.

    Args:
        model: that computes it.
        shapes: of which it has the least number of pages that will do.
        tasks: whose turn it is.
        read: the next tokens of each.
        shape: rows, and tokens of each.
    """
    batch, long = shape
    size = shapes.page
    most = max(pages_for(task.computed + MOST_STEPS + len(new), size) for task, new in zip(tasks, read, strict=True))
    width = next((width for width in shapes.widths(long) if width >= most), shapes.pages[-1])

    def column(values: Iterable[int], fill: int = 0) -> np.ndarray:
        values = list(values)
        return np.array([*values, *[fill] * (batch - len(values))], np.int32)

    tokens = np.zeros((batch, long), np.int32)
    table = np.full((batch, width), NOBODY, np.int32)
    stops = np.full((batch, STOPS), -1, np.int32)
    segments = np.zeros((batch, width * size if model.config.mask_documents else 0), np.int32)
    segment = np.zeros(batch, np.int32)
    for row, (task, new) in enumerate(zip(tasks, read, strict=True)):
        tokens[row, : len(new)] = new
        table[row, : len(task.pages[:width])] = task.pages[:width]
        some = sorted(task.request.stop_tokens)[:STOPS]
        stops[row, : len(some)] = some
        if model.config.mask_documents:
            held = np.cumsum(np.array(task.tokens[: task.computed], np.int32) == _separator(model))
            segments[row, : len(held)] = held
            segment[row] = held[-1] if len(held) else 0
    draws = [
        task.room if task.computed + len(new) >= len(task.tokens) else 0 for task, new in zip(tasks, read, strict=True)
    ]
    words = np.full((batch, words_of(model.vocab_size)), -1, np.int32)
    for task, own, room in zip(tasks, words, draws, strict=False):
        if task.request.constraint is not None and room:
            task.request.constraint.allow(own)
    return Rows(
        tokens=tokens,
        counts=column(map(len, read)),
        held=column(task.computed for task in tasks),
        last=column((task.tokens[task.computed - 1] if task.computed else -1 for task in tasks), -1),
        segment=segment,
        segments=segments,
        table=table,
        slots=column(task.slot for task in tasks),
        drawn=column(task.drawn for task in tasks),
        room=column(draws),
        stops=stops,
        logprobs=column(task.request.top_logprobs is not None for task in tasks).astype(bool),
        ways=ways([task.request.sampling for task in tasks], batch),
        allowed=words,
        constrained=column(task.request.constraint is not None for task in tasks).astype(bool),
    )


def _separator(model: Model) -> int:
    return -1 if model.separator_id is None else model.separator_id
