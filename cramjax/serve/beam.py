"""Beam search: the likeliest continuations, not drawn but looked for.

In every step each beam is continued by its likeliest tokens, and the likeliest continuations of all stay. One that ends
is judged by its log-probability divided by its length to a power, its score; the search goes on until no beam can come
to a better score than those that have ended, so that with enough beams it is exhaustive.

Sources: length normalisation as of transformers (log p / length^α), early stopping only where it changes nothing (its
`early_stopping="never"`); diverse beams of Vijayakumar et al. 2018, arXiv:1610.02424, with Hamming diversity.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from cramjax.compiling import BRIEF, jit
from cramjax.errors import ConfigError
from cramjax.kernels.largest import largest
from cramjax.language_model import LanguageModel
from cramjax.model import Model
from cramjax.model.decode import TextCache
from cramjax.serve.decoding import for_decoding
from cramjax.serve.prompts import causal_model, encoded_prompts, never_drawn, text_after, window_of
from cramjax.training.given import Given


@dataclass(frozen=True)
class BeamSearch:
    """How continuations are looked for."""

    beams: int = 4
    """Continuations that are kept in each step, of all groups together."""
    length_penalty: float = 1.0
    """Power of the length that log-probabilities are divided by: 0 prefers short texts, more prefers long ones."""
    groups: int = 1
    """Groups of beams, each of which keeps away from the tokens that those before it took in the same step."""
    diversity: float = 0.0
    """Taken from a token's log-probability in choosing, for each beam of the groups before that took it."""

    def __post_init__(self):
        checks = (
            ("beams", self.beams, self.beams >= 1, "1 or more"),
            ("length_penalty", self.length_penalty, abs(self.length_penalty) < float("inf"), "finite"),
            ("groups", self.groups, self.groups >= 1 and self.beams % self.groups == 0, "a divisor of beams"),
            ("diversity", self.diversity, 0.0 <= self.diversity < float("inf"), "0 or more"),
        )
        for name, value, right, allowed in checks:
            if not right:
                raise ConfigError(f"{name} must be {allowed}, got {value}.")
        if self.diversity and self.groups == 1:
            raise ConfigError(f"diversity is between groups, got {self.diversity} and one group: give groups too.")


@dataclass(frozen=True)
class Hypothesis:
    """A continuation that was found."""

    text: str
    tokens: tuple[int, ...]
    """The token that ends the text is one of them."""
    log_probability: float
    """Of all of them together, in nats."""
    score: float
    """What it was judged by."""
    ended: bool
    """Whether the text ends here, and not only the limit of tokens."""


@dataclass(frozen=True)
class Beam:
    """A continuation on its way."""

    tokens: tuple[int, ...] = ()
    log_probability: float = 0.0
    """Of all of them together, in nats."""


def beam_search(
    given: Given,
    prompts: str | Sequence[str],
    search: BeamSearch | None = None,
    *,
    max_tokens: int = 128,
    chat: bool = False,
    weights: str = "auto",
) -> list[list[Hypothesis]]:
    """The best continuations of each prompt, best first; as many as there are beams, or fewer if there are no more.

    Args:
        given: a causal run or model, or the path of one.
        prompts: one text or several; the empty text starts a document.
        search: how to look.
        max_tokens: most tokens of a continuation; prompt and continuation must fit the model's context.
        chat: take each prompt for what a user says, and let the model answer, by its chat template.
        weights: how they are held meanwhile, as of `for_decoding`.

    Raises:
        ConfigError: a value is out of range, or a prompt leaves no room.
        RunError: the model is not causal, or has no chat template.
    """
    search, model = search or BeamSearch(), causal_model(given)
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be 1 or more, got {max_tokens}.")
    starts, rows = encoded_prompts(model, [prompts] if isinstance(prompts, str) else list(prompts), chat=chat)
    for row in rows:
        if len(row) + max_tokens > model.context:
            raise ConfigError(
                f"prompt and max_tokens must be at most {model.context} tokens together (the context), got {len(row)} "
                f"and {max_tokens}: beams are not seen through a window."
            )
    decoded = for_decoding(model, weights)
    found = []
    for start, row in zip(starts, rows, strict=True):
        ends = model.tokenizer.ends
        hypotheses = search_tokens(decoded, row, search, max_tokens)
        found.append(
            [
                replace(each, text=text_after(model.tokenizer, row[start:], [t for t in each.tokens if t not in ends]))
                for each in hypotheses
            ]
        )
    return found


def search_tokens(model: LanguageModel, prompt: Sequence[int], search: BeamSearch, max_tokens: int) -> list[Hypothesis]:
    """The best continuations of a prompt's tokens, without their texts, best first.

    Args:
        model: a causal one.
        prompt: token ids, one or more.
        search: how to look.
        max_tokens: most tokens of a continuation.
    """
    stack, params, ends = model.model, model.params, model.tokenizer.ends
    banned = never_drawn(model.tokenizer, stack.vocab_size)
    each = search.beams // search.groups
    # Of each beam so many: even if all of the first ones end, or are others' by now, enough are left.
    most = min((1 + len(ends)) * each + search.beams, stack.vocab_size)
    length = window_of(model.context, len(prompt) + max_tokens)
    tokens = np.zeros((1, min(length, 1 << (len(prompt) - 1).bit_length())), np.int32)
    tokens[0, : len(prompt)] = prompt
    cache = _read(stack, params, jnp.asarray(tokens), jnp.int32([len(prompt) - 1]), length, search.beams)
    # All beams begin alike, so that each group begins with one.
    groups = [Group(each, [Beam()]) for _ in range(search.groups)]
    parents, newest = np.zeros(search.beams, np.int32), np.full(search.beams, prompt[-1], np.int32)
    for number in range(max_tokens):
        cache, values, ids = _continue(stack, banned, most, params, cache, jnp.asarray(parents), jnp.asarray(newest))
        values, ids = jax.device_get((values, ids))
        taken: list[int] = []
        for place, group in enumerate(groups):
            rows = slice(place * each, place * each + len(group.beams))
            chosen = group.step(values[rows], ids[rows], ends, search, taken)
            taken += [beam.tokens[-1] for beam in group.beams]
            for row, (parent, beam) in enumerate(zip(chosen, group.beams, strict=True)):
                parents[place * each + row], newest[place * each + row] = place * each + parent, beam.tokens[-1]
        if number + 1 < max_tokens and all(group.is_done(search, max_tokens) for group in groups):
            break
    else:
        for group in groups:
            group.end_all(search)
    best = sorted((each for group in groups for each in group.ended), key=lambda found: -found.score)
    return best[: search.beams]


class Group:
    """Beams that are chosen among each other."""

    def __init__(self, size: int, beams: list[Beam]):
        """Begin with some beams, of which there will be so many."""
        self.size, self.beams = size, beams
        self.ended: list[Hypothesis] = []
        """The best so far, best first, as many as there are beams at most."""

    def step(
        self, values: np.ndarray, ids: np.ndarray, ends: Sequence[int], search: BeamSearch, taken: Sequence[int]
    ) -> list[int]:
        """Take the best continuations of the beams by one token.

        Args:
            values: log-probabilities of each beam's likeliest tokens (beams, candidates).
            ids: these tokens.
            ends: tokens that end a text.
            search: how to look.
            taken: tokens of the groups before, in this step.

        Returns:
            Which beam each new one continues.
        """
        candidates = []
        for parent, (beam, own, tokens) in enumerate(zip(self.beams, values, ids, strict=True)):
            for value, token in zip(own.tolist(), tokens.tolist(), strict=True):
                if value > -np.inf:
                    total = beam.log_probability + value
                    candidates.append((total - search.diversity * taken.count(token), total, parent, token))
        candidates.sort(key=lambda candidate: -candidate[0])
        chosen, parents = [], []
        for rank, (_, total, parent, token) in enumerate(candidates):
            beam = Beam((*self.beams[parent].tokens, token), total)
            if token not in ends:
                chosen.append(beam)
                parents.append(parent)
            elif rank < self.size:  # one that no beam would have had a place for is no result of these beams
                self._end(beam, search, ended=True)
            if len(chosen) == self.size:
                break
        self.beams = chosen
        return parents

    def is_done(self, search: BeamSearch, max_tokens: int) -> bool:
        """Whether no beam can come to a better score than the worst of those that ended."""
        if not self.beams:
            return True
        if len(self.ended) < self.size:
            return False
        length = max_tokens if search.length_penalty > 0 else len(self.beams[0].tokens) + 1
        likeliest = max(beam.log_probability for beam in self.beams)
        return self.ended[-1].score >= likeliest / length**search.length_penalty

    def end_all(self, search: BeamSearch) -> None:
        """End all beams where they are: the limit is reached."""
        for beam in self.beams:
            self._end(beam, search, ended=False)

    def _end(self, beam: Beam, search: BeamSearch, *, ended: bool) -> None:
        score = beam.log_probability / len(beam.tokens) ** search.length_penalty
        self.ended.append(Hypothesis("", beam.tokens, beam.log_probability, score, ended))
        self.ended = sorted(self.ended, key=lambda found: -found.score)[: self.size]


@partial(jit, seconds=BRIEF, static_argnames=("model", "length", "beams"))
def _read(
    model: Model, params: PyTree, tokens: Int[Array, "1 width"], counts: Int[Array, "1"], length: int, beams: int
) -> TextCache:
    """A cache that holds the first `counts` tokens, once for each beam."""
    cache = model.decode(params, model.init_cache(1, length, params), tokens, counts)[1]
    return _rows(cache, jnp.zeros(beams, jnp.int32))


@partial(jit, seconds=BRIEF, static_argnames=("model", "banned", "most"), donate_argnames="cache")
def _continue(
    model: Model,
    banned: tuple[int, ...],
    most: int,
    params: PyTree,
    cache: TextCache,
    parents: Int[Array, " beams"],
    newest: Int[Array, " beams"],
) -> tuple[TextCache, Float[Array, "beams most"], Int[Array, "beams most"]]:
    """The caches of the beams that are continued, with their newest tokens; the likeliest tokens after them."""
    hidden, cache = model.decode(params, _rows(cache, parents), newest[:, None])
    values = jax.nn.log_softmax(model.logits(params, hidden[:, 0]).astype(jnp.float32), axis=-1)
    return cache, *largest(values.at[:, jnp.asarray(banned, jnp.int32)].set(-jnp.inf), most)


def _rows(cache: TextCache, rows: Int[Array, " beams"]) -> TextCache:
    """Some rows of a cache."""
    blocks = jax.tree.map(lambda part: part[:, rows], cache.blocks)
    names = ("segment_ids", "segment", "last", "length")
    taken: dict[str, Any] = {name: getattr(cache, name)[rows] for name in names}
    return replace(cache, blocks=blocks, **taken)
