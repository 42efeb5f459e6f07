"""Texts of many requests, embedded together: an engine that `cramjax.serve.http.worker` runs like the other one."""

import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cramjax.language_model import LanguageModel
from cramjax.serve.embed import embed
from cramjax.serve.lengths import Programs
from cramjax.serve.lengths.triggers import Hungry, Trigger
from cramjax.serve.request import Reason

_NAP = 0.002
"""Seconds between two looks at what has come, while texts wait for others."""
_TEXTS, _TOKENS = 256, 16384
"""Of one round: the first text is always in it."""


@dataclass(frozen=True)
class TextToEmbed:
    """A text that is to be embedded."""

    prompt: tuple[int, ...]
    """Its ids, from `tokens_to_embed`."""


@dataclass(frozen=True)
class Embedded:
    """What came of it."""

    vector: np.ndarray | None = None
    """Float32 (embed,); None: it was cancelled."""
    reason: Reason = "stop"


class _Waiting(NamedTuple):
    request: TextToEmbed
    listener: Callable[[Embedded], None]
    since: float


@dataclass(frozen=True)
class EmbedderLoad:
    """What the embedder holds; it has neither pages nor guesses."""

    waiting: int
    running: int = 0
    pages: int = 1
    pages_used: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    guessed_tokens: int = 0
    right_guesses: int = 0
    compilations: int = 0


def is_embedder(model: LanguageModel) -> bool:
    """Whether a model is served for its vectors: one that continues no text, or that says how vectors are made."""
    return model.kind != "causal" or model.embedding is not None


class Embedder:
    """Embeds the texts that wait, as many together as are worth it."""

    def __init__(self, model: LanguageModel, alone: bool = False, trigger: Trigger | None = None):
        """Compile what short texts need.

        Args:
            model: from which vectors come.
            alone: embed each text by itself, so that what else is asked for changes not even its last bits.
            trigger: says how long texts wait for the company of others. Default: none does.

        Raises:
            RunError: the model has labels for tokens.
        """
        model.require_tokens()
        self.context, self.vocab_size = model.context, model.tokenizer.vocab_size
        self._model, self._most = model, 1 if alone else _TEXTS
        self._numbers = itertools.count()
        self._waiting: OrderedDict[int, _Waiting] = OrderedDict()
        self._trigger = trigger or Hungry()
        # Programs for what was asked before, unless each text's own bits are to depend on nothing before it.
        self._programs = None if alone else Programs()
        self._embed([(model.tokenizer.separator_id,)])

    def add(self, request: TextToEmbed, listener: Callable[[Embedded], None]) -> int:
        """Let a text wait; `step` will tell the listener its vector.

        Returns:
            Its number, for `cancel`.
        """
        number = next(self._numbers)
        self._waiting[number] = _Waiting(request, listener, time.monotonic())
        return number

    def cancel(self, number: int) -> None:
        """Embed it no more; one that is done is left alone."""
        if (found := self._waiting.pop(number, None)) is not None:
            found.listener(Embedded(reason="cancelled"))

    def step(self) -> bool:
        """Embed some of the texts that wait.

        Returns:
            Whether there were any.
        """
        wait = self._trigger.wait([each.since for each in self._waiting.values()], time.monotonic())
        if 0 < wait < math.inf:
            time.sleep(min(wait, _NAP))
            return True
        chosen: list[int] = []
        tokens = 0
        for number, each in itertools.islice(self._waiting.items(), self._most):
            tokens += len(each.request.prompt)
            if chosen and tokens > _TOKENS:
                break
            chosen.append(number)
        taken = [self._waiting.pop(number) for number in chosen]
        for each, vector in zip(taken, self._embed([each.request.prompt for each in taken]), strict=True):
            each.listener(Embedded(vector))
        return bool(taken)

    def _embed(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return list(embed(self._model, texts, programs=self._programs))

    def load(self) -> EmbedderLoad:
        """What it holds."""
        return EmbedderLoad(len(self._waiting))
