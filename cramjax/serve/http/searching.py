"""Beam search over the served engine: each step is a request for one token of each beam, among those of everybody else.

Beginnings that were read before are found again (the engine's prefix cache), so that a step reads few tokens. The beams
are those of `cramjax.serve.beam`, which says what is looked for.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cramjax.serve.beam import Beam, BeamSearch, Group
from cramjax.serve.http.worker import Worker
from cramjax.serve.request import Progress, Request, SamplingParameters, TokenLogprob

MOST_CANDIDATES = 20
"""Likeliest tokens that the engine tells of: those that a beam can go on with, and those that end it."""
NO_MORE = "there are no more answers of so few tokens"
"""Of an answer that was asked for and does not exist."""


@dataclass(frozen=True)
class Search:
    """What is looked for, for each prompt."""

    beams: BeamSearch
    ends: tuple[int, ...]
    """Tokens that end an answer."""


@dataclass(frozen=True)
class _Path:
    """The tokens of a beam: beams that begin alike share their beginning."""

    before: "_Path | None"
    newest: TokenLogprob


class Searching:
    """Searches in progress: of each answer there is one progress, when it is found. For others as `worker.Answers`."""

    def __init__(self, worker: Worker, requests: Sequence[Request], search: Search):
        """Begin a search for each of some requests."""
        self._worker, self._search = worker, search
        self._found: list[tuple[int, Progress]] = []
        each = search.beams.beams
        self._open = {asyncio.create_task(self._find(n * each, request)) for n, request in enumerate(requests)}

    async def next(self) -> tuple[int, Progress] | None:
        """Index of an answer and its progress; None: there are no more.

        Raises:
            RequestError: the engine refused it, or has ended.
        """
        while not self._found and self._open:
            done, self._open = await asyncio.wait(self._open, return_when=asyncio.FIRST_COMPLETED)
            errors = [error for task in done if (error := task.exception()) is not None]
            if errors:
                raise errors[0]
            self._found = [each for task in done for each in task.result()]
        return self._found.pop(0) if self._found else None

    def cancel(self, index: int) -> None:
        """Nothing: what is found is whole."""

    def close(self) -> None:
        """End all of them."""
        for task in self._open:
            task.cancel()

    async def _find(self, first: int, request: Request) -> list[tuple[int, Progress]]:
        """The best answers to a prompt, best first, their indices from `first` on."""
        search, group = self._search, Group(self._search.beams.beams, [Beam()])
        begun = Progress()
        paths: list[_Path | None] = [None]
        ended: dict[tuple[int, ...], _Path | None] = {}
        for number in range(request.max_tokens):
            progress = await self._all([_step(request, beam) for beam in group.beams])
            if any(each.reason == "cancelled" for each in progress):
                return [(first + place, Progress(reason="cancelled")) for place in range(group.size)]
            begun = begun if number else progress[0]
            top = [each.logprobs[0].top for each in progress]
            before = {beam.tokens: own for beam, *own in zip(group.beams, paths, top, strict=True)}
            ids = np.array([[token for token, _ in own] for own in top])
            group.step(np.array([[value for _, value in own] for own in top]), ids, search.ends, search.beams, ())
            # Of the beams before only what these go on with is kept.
            ended = {each.tokens: ended.get(each.tokens) or _path(each.tokens, before) for each in group.ended}
            paths = [_path(beam.tokens, before) for beam in group.beams]
            if number + 1 < request.max_tokens and group.is_done(search.beams, request.max_tokens):
                break
        else:
            ended |= {beam.tokens: path for beam, path in zip(group.beams, paths, strict=True)}
            group.end_all(search.beams)
        whole = [
            replace(
                begun,
                tokens=each.tokens,
                logprobs=_along(ended[each.tokens]),
                reason="stop" if each.ended else "length",
            )
            for each in group.ended
        ]
        missing = [Progress(reason="stuck", why=NO_MORE)] * (group.size - len(whole))
        return [(first + place, each) for place, each in enumerate([*whole, *missing])]

    async def _all(self, requests: Sequence[Request]) -> list[Progress]:
        """What the engine says of some requests, in their order."""
        answers = self._worker.submit(requests)
        found: dict[int, Progress] = {}
        try:
            while (came := await answers.next()) is not None:
                found[came[0]] = came[1]
        finally:
            answers.close()
        return [found[index] for index in range(len(requests))]


def _step(request: Request, beam: Beam) -> Request:
    changed: dict[str, Any] = {"prompt": (*request.prompt, *beam.tokens), "max_tokens": 1}
    scores = request.prompt_logprobs and not beam.tokens
    greedy = SamplingParameters(temperature=0.0)
    return replace(request, **changed, sampling=greedy, top_logprobs=MOST_CANDIDATES, prompt_logprobs=scores)


def _path(tokens: tuple[int, ...], before: Mapping[tuple[int, ...], Any]) -> _Path:
    """That of a beam which goes on with one of those `before`: of each of them, a path and the likeliest tokens."""
    path, top = before[tokens[:-1]]
    return _Path(path, TokenLogprob(tokens[-1], dict(top)[tokens[-1]], top))


def _along(path: _Path | None) -> tuple[TokenLogprob, ...]:
    """First token first."""
    found = []
    while path is not None:
        found.append(path.newest)
        path = path.before
    return tuple(found[::-1])
