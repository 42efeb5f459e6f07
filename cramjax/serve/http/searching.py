"""Beam search over the served engine: each step is a request for one token of each beam, among those of everybody else.

Beginnings that were read before are found again (the engine's prefix cache), so that a step reads few tokens. The beams
are those of `cramjax.serve.beam`, which says what is looked for.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cramjax.serve.beam import Beam, BeamSearch, Group, Hypothesis
from cramjax.serve.http.worker import Worker
from cramjax.serve.request import Progress, Request, SamplingParameters, TokenLogprob

MOST_CANDIDATES = 20
"""Likeliest tokens that the engine tells of: those that a beam can go on with, and those that end it."""


@dataclass(frozen=True)
class Search:
    """What is looked for, for each prompt."""

    beams: BeamSearch
    ends: tuple[int, ...]
    """Tokens that end an answer."""
    banned: frozenset[int]
    """Tokens that none holds."""


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
        after: dict[tuple[int, ...], Progress] = {}
        for number in range(request.max_tokens):
            steps = [_step(request, beam) for beam in group.beams]
            progress = await self._all(steps)
            if any(each.reason == "cancelled" for each in progress):
                return [(first + place, Progress(reason="cancelled")) for place in range(group.size)]
            after |= {beam.tokens: each for beam, each in zip(group.beams, progress, strict=True)}
            top = [each.logprobs[0].top for each in progress]
            ids = np.array([[token for token, _ in own] for own in top])
            values = np.array([[-np.inf if token in search.banned else value for token, value in own] for own in top])
            group.step(values, ids, search.ends, search.beams, ())
            if number + 1 < request.max_tokens and group.is_done(search.beams, request.max_tokens):
                break
        else:
            group.end_all(search.beams)
        return [(first + place, _whole(found, after)) for place, found in enumerate(group.ended)]

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


def _whole(found: Hypothesis, after: dict[tuple[int, ...], Progress]) -> Progress:
    """Progress that is a whole answer, from the steps `after` each of its beginnings."""
    begun = after[()]
    logprobs = []
    for place, token in enumerate(found.tokens):
        top = after[found.tokens[:place]].logprobs[0].top
        logprobs.append(TokenLogprob(token, dict(top)[token], top))
    reason = "stop" if found.ended else "length"
    return Progress(found.tokens, tuple(logprobs), begun.prompt_logprobs, begun.cached, reason=reason)
