"""Requests on their way, and the batches that they make."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cramjax.kernels.packed import prompt_of
from cramjax.language_model import LanguageModel
from cramjax.model import Model
from cramjax.serve.constraints import words_of
from cramjax.serve.engine.draw import ways
from cramjax.serve.engine.pages import NOBODY
from cramjax.serve.engine.programs import MOST_STEPS, STOPS, Rows
from cramjax.serve.engine.schedule import Held, pages_for
from cramjax.serve.request import Progress, Reason, Request, TokenLogprob
from cramjax.serving import EngineConfig

Listener = Callable[[Progress], None]

NO_TOKEN = "what is asked of the text allows no token here"
"""Of a text that is stuck."""
_VERIFIED = 8
"""Rows up to which guesses are verified: more of them keep a machine busy without."""
_SCORED = 64
_LEAST, _PIECE = 8, 512
"""Tokens of a prompt that are read at once, for a few requests: least and most."""


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
    """Of the full pages that are known; while it waits, of those that are looked for."""
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
    followed: int = 0
    """Tokens of prompt and text that a draft model holds."""
    guessed: int = 0
    """Tokens that were guessed for it, until they are reported."""
    right: int = 0
    """Those of them that were drawn too."""

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

    @property
    def stuck_with(self) -> str:
        """Why nothing could be taken."""
        constraint = self.request.constraint
        return constraint.failure if constraint is not None and constraint.failure else NO_TOKEN

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
    """Of a row, a prompt's of virtual tokens among them."""
    verify: tuple[int, ...] = ()
    """Rows of calls that verify guesses."""
    guesses: int = 0
    """Tokens that are guessed at once."""
    separator: int | None = None
    """The token that documents begin after, where attention stays within them."""
    virtual: int = 0
    """Tokens of a prompt that every row begins with; whole pages."""

    @property
    def scored(self) -> int:
        """Tokens of a piece of a prompt whose log-probabilities are wanted: their logits are all there at once."""
        return min(_SCORED, self.pages[-1] * self.page)

    @property
    def before(self) -> int:
        """Pages of virtual tokens."""
        return self.virtual // self.page

    def widths(self, long: int) -> tuple[int, ...]:
        """Pages that a row can have in calls of so many tokens."""
        return tuple(width for width in self.pages if width * self.page >= long)


def separator_of(model: LanguageModel, draft: LanguageModel | None = None) -> int | None:
    """The token that documents begin after, if attention of a model or its draft stays within them."""
    stacks = [each.model for each in (model, draft) if each is not None]
    return next((each.separator_id for each in stacks if each.config.mask_documents), None)


def page_size(config: EngineConfig, virtual: int) -> int:
    """Tokens of a page: as configured, or the next number that fills whole pages with a prompt of virtual tokens."""
    return next(
        (size for size in range(config.page_tokens, virtual) if virtual % size == 0), virtual or config.page_tokens
    )


def make_shapes(config: EngineConfig, model: LanguageModel, context: int, draft: LanguageModel | None = None) -> Shapes:
    """The shapes of calls for many requests that come and go: a dozen or two in all.

    Args:
        config: of the engine.
        model: that computes them.
        context: tokens of a request.
        draft: a model that guesses.
    """
    virtual = prompt_tokens(model)
    page = page_size(config, virtual)
    row_pages = pages_for(context + virtual, page)
    longest = row_pages * page
    others: dict[str, Any] = {"separator": separator_of(model, draft), "virtual": virtual}

    def reads(*shapes: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        rows = [(min(many, config.slots), min(long, longest)) for many, long in shapes]
        return tuple(dict.fromkeys(rows))

    if config.deterministic:  # one shape: what a row gives does not depend on how many are beside it
        return Shapes(page, reads((1, 64)), step=(config.slots,), pages=(row_pages,), **others)
    sizes = [size for size in (1, 4, 16, 64) if size < config.slots]
    pages = tuple(sorted({max(row_pages // 4, 1), row_pages}))
    steps = (*sizes, config.slots)
    verify = tuple(size for size in steps if size <= _VERIFIED) if config.guesses else ()
    return Shapes(
        page,
        reads((1, 16), (1, 64), (1, 256), (4, 64)),
        steps,
        pages,
        verify=verify,
        guesses=config.guesses,
        **others,
    )


def few_shapes(config: EngineConfig, model: LanguageModel, longest: int, draft: LanguageModel | None = None) -> Shapes:
    """The shapes of calls for a few requests that come together: one of each kind, as there is nobody to come.

    Args:
        config: of the engine, with a slot for each of them and its context.
        model: that continues them.
        longest: tokens of the longest prompt.
        draft: a model that guesses.
    """
    assert config.context is not None
    virtual = prompt_tokens(model)
    page = page_size(config, virtual)
    width = pages_for(config.context + virtual, page)
    long = min(1 << max(longest - 1, _LEAST - 1).bit_length(), _PIECE, width * page)
    return Shapes(
        page,
        prefill=((config.slots, long),),
        step=(config.slots,),
        pages=(width,),
        verify=(config.slots,) if config.guesses and config.slots <= _VERIFIED else (),
        guesses=config.guesses,
        separator=separator_of(model, draft),
        virtual=virtual,
    )


def prompt_tokens(model: LanguageModel) -> int:
    """Virtual tokens of a prompt that every text begins with."""
    prompt = prompt_of(model.params["embed"]["token"]["table"])
    return 0 if prompt is None else len(prompt)


def make_rows(
    model: Model,
    shapes: Shapes,
    before: Sequence[int],
    tasks: Sequence[Task],
    read: Sequence[Sequence[int]],
    shape: tuple[int, int],
    starts: Sequence[int],
) -> Rows:
    """The batch of a call.

    Args:
        model: that computes it.
        shapes: of which it has the least number of pages that will do.
        before: pages that every row begins with.
        tasks: whose turn it is.
        read: the next tokens of each.
        shape: rows, and tokens of each.
        starts: tokens of each that are held.
    """
    batch, long = shape
    size = shapes.page
    most = max(pages_for(start + MOST_STEPS + len(new), size) for start, new in zip(starts, read, strict=True))
    width = next((width for width in shapes.widths(long) if width >= most + shapes.before), shapes.pages[-1])

    def column(values: Iterable[int], fill: int = 0) -> np.ndarray:
        values = list(values)
        return np.array([*values, *[fill] * (batch - len(values))], np.int32)

    tokens = np.zeros((batch, long), np.int32)
    table = np.full((batch, width), NOBODY, np.int32)
    stops = np.full((batch, STOPS), -1, np.int32)
    segments = np.zeros((batch, 0 if shapes.separator is None else width * size), np.int32)
    segment = np.zeros(batch, np.int32)
    for row, (task, new, start) in enumerate(zip(tasks, read, starts, strict=True)):
        tokens[row, : len(new)] = new
        pages = [*before, *task.pages][:width]
        table[row, : len(pages)] = pages
        some = sorted(task.request.stop_tokens)[:STOPS]
        stops[row, : len(some)] = some
        if shapes.separator is not None:
            held = np.cumsum(np.array(task.tokens[:start], np.int32) == shapes.separator)
            segments[row, shapes.virtual : shapes.virtual + len(held)] = held
            segment[row] = held[-1] if len(held) else 0
    draws = [
        task.room if start + len(new) >= len(task.tokens) else 0
        for task, new, start in zip(tasks, read, starts, strict=True)
    ]
    words = np.full((batch, words_of(model.vocab_size)), -1, np.int32)
    for task, own, room in zip(tasks, words, draws, strict=False):
        if task.request.constraint is not None and room:
            task.request.constraint.allow(own)
    return Rows(
        tokens=tokens,
        counts=column(map(len, read)),
        held=column(shapes.virtual + start for start in starts),
        last=column((task.tokens[start - 1] if start else -1 for task, start in zip(tasks, starts, strict=True)), -1),
        segment=segment,
        segments=segments,
        table=table,
        slots=column(task.slot for task in tasks),
        drawn=column(task.request.drawn + task.drawn for task in tasks),
        room=column(draws),
        stops=stops,
        logprobs=column(task.request.top_logprobs is not None for task in tasks).astype(bool),
        ways=ways([task.request.sampling for task in tasks], batch),
        allowed=words,
        constrained=column(task.request.constraint is not None for task in tasks).astype(bool),
        virtual=shapes.virtual,
    )
