"""How likely a model finds tokens: the sums that every score of a task is made of.

Requests of all lengths become few batches. Rows that begin another row are read off that row, for a causal model's
prediction depends on nothing after it: the choices of a question that differ in their last token cost one row. Rows of
like lengths share a buffer without padding (`cramjax.serve.lengths`), and logits exist only where a token is asked for.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from cramjax.compiling import BRIEF, jit
from cramjax.errors import DataError, RunError
from cramjax.language_model import LanguageModel
from cramjax.model import Model
from cramjax.model.ragged import Ragged
from cramjax.serve.lengths import batches, costs_of, ragged_of
from cramjax.training.given import Given, language_model

Tokens = Sequence[int]
Pair = tuple[Tokens, Tokens]
"""Ids of a context, at least one, and ids of what continues it, at least one."""
Progress = Callable[[int, int], None]
"""Is told how many of how many rows are done."""

_LEAST_PREDICTIONS = 256
"""So that small batches share programs."""
_LOGITS = 1 << 25
"""Most logits that exist at once: 128 MiB."""


class Likelihood(NamedTuple):
    """What a model makes of a text."""

    total: float
    """Its log-likelihood in nats, the sum over its tokens."""
    greedy: bool
    """Whether each of its tokens is the likeliest in its place."""


class _Question(NamedTuple):
    """Tokens that are asked of one row: the first is predicted where `start` stands, the next one place on."""

    row: int
    start: int
    targets: Tokens


def loglikelihoods(given: Given, pairs: Sequence[Pair], progress: Progress | None = None) -> list[Likelihood]:
    """The log-likelihood of each continuation after its context, under a causal model.

    Values do not depend on what else is asked, beyond the rounding of products of other shapes. A context that does not
    fit is cut from the left: what is seen is the model's context, less where the text is shorter.

    Args:
        given: a causal run or model, or the path of one.
        pairs: ids of contexts and continuations; see `cramjax.evaluation.encoding.encode_pair`.
        progress: is told of each batch.

    Raises:
        RunError: the model is not causal.
        DataError: a context or a continuation without tokens, or a continuation longer than the model's context.
    """
    model = language_model(given)
    require_causal(model)
    rows, starts = [], []
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise DataError(f"request {number} has an empty context or continuation: each needs at least one token.")
        if len(continuation) > model.context:
            raise DataError(
                f"the continuation of request {number} has {len(continuation)} tokens, and {model.path} sees at most "
                f"{model.context}: shorten it."
            )
        seen = [*context, *continuation][-(model.context + 1) : -1]
        rows.append(tuple(seen))
        starts.append(len(seen) - len(continuation))
    kept, place = _without_prefixes(rows)
    questions = [
        _Question(place[row], start, continuation)
        for row, start, (_, continuation) in zip(rows, starts, pairs, strict=True)
    ]
    return _answers(model, kept, questions, progress)


def pseudo_loglikelihoods(given: Given, texts: Sequence[Tokens], progress: Progress | None = None) -> list[Likelihood]:
    """The pseudo-log-likelihood of each text under a masked model: each token masked alone, seeing all others.

    Args:
        given: a masked run or model, or the path of one.
        texts: ids of texts, without the tokens that stand before and after a text.
        progress: is told of each batch.

    Raises:
        RunError: the model is not masked.
        DataError: a text without tokens, or longer than the model's context.

    Source: Salazar et al. 2020, Masked Language Model Scoring, equation 1.
    """
    model = language_model(given)
    mask = _mask_of(model)
    rows, questions = [], []
    for number, text in enumerate(texts):
        opening = model.tokenizer.opening()
        framed = [*opening, *text, model.tokenizer.separator_id]
        if not len(text) or len(framed) > model.context:
            raise DataError(
                f"text {number} has {len(text)} tokens; {model.path} scores texts of 1 to "
                f"{model.context - len(opening) - 1}: shorten it."
            )
        for place, token in enumerate(text, start=len(opening)):
            questions.append(_Question(len(rows), place, [token]))
            rows.append((*framed[:place], mask, *framed[place + 1 :]))
    each = iter(_answers(model, rows, questions, progress))
    tokens = [[next(each) for _ in text] for text in texts]
    return [Likelihood(sum(t.total for t in own), all(t.greedy for t in own)) for own in tokens]


def require_causal(model: LanguageModel) -> None:
    """Refuse a model that does not predict the next token.

    Raises:
        RunError: it is masked, or an encoder without a head.
    """
    if model.kind == "masked":
        raise RunError(
            f"{model.path} is a masked model, which gives no probability of a continuation: use a causal one."
        )
    if model.kind == "encoder":
        raise RunError(f"{model.path} is an encoder without a head, which predicts no tokens: use a causal model.")


def _mask_of(model: LanguageModel) -> int:
    if model.kind != "masked":
        raise RunError(f"{model.path} is not a masked model (it is {model.kind}): score it with loglikelihoods.")
    if model.tokenizer.mask_id is None:
        raise RunError(f"{model.path} has a tokenizer without a mask token, so nothing can be asked of it.")
    return model.tokenizer.mask_id


def _without_prefixes(rows: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], int]]:
    """The rows that no other row begins with, and in which of these each row is found."""
    kept: list[tuple[int, ...]] = []
    place: dict[tuple[int, ...], int] = {}
    # From the end of the order of words: all that begin with a row stand behind it, the nearest right behind it.
    for row in sorted(set(rows), reverse=True):
        if not kept or kept[-1][: len(row)] != row:
            kept.append(row)
        place[row] = len(kept) - 1
    return kept, place


def _answers(
    model: LanguageModel, rows: Sequence[tuple[int, ...]], questions: Sequence[_Question], progress: Progress | None
) -> list[Likelihood]:
    """The answer to each question, batch by batch."""
    asked: list[list[int]] = [[] for _ in rows]
    for number, question in enumerate(questions):
        asked[question.row].append(number)
    answers: list[Likelihood | None] = [None] * len(questions)
    chunk = max(1, 1 << (_LOGITS // model.model.vocab_size).bit_length() - 1)
    done = 0
    lengths = [len(row) for row in rows]
    for batch in batches(lengths, costs_of(model, sum(lengths))):
        texts = ragged_of(batch, rows)
        numbers = [(int(texts.starts[place]), number) for place, row in enumerate(batch.texts) for number in asked[row]]
        at = [first + questions[n].start + i for first, n in numbers for i in range(len(questions[n].targets))]
        targets = [token for _, n in numbers for token in questions[n].targets]
        count = max(_LEAST_PREDICTIONS, 1 << (len(at) - 1).bit_length())
        shape = (-(-count // chunk), min(count, chunk))
        padding = (0, count - len(at))
        logs, best = jax.device_get(
            _predictions(
                model.model,
                model.params,
                texts,
                jnp.asarray(np.pad(np.array(at, np.int32), padding).reshape(shape)),
                jnp.asarray(np.pad(np.array(targets, np.int32), padding).reshape(shape)),
            )
        )
        logs, best, start = logs.reshape(-1).astype(np.float64), best.reshape(-1), 0
        for _, number in numbers:
            stop = start + len(questions[number].targets)
            answers[number] = Likelihood(float(logs[start:stop].sum()), bool(best[start:stop].all()))
            start = stop
        done += len(batch.texts)
        if progress is not None:
            progress(done, len(rows))
    return answers  # pyright: ignore[reportReturnType]  # every question is of a row


@partial(jit, seconds=BRIEF, static_argnames="model")
def _predictions(
    model: Model,
    params: PyTree,
    texts: Ragged,
    at: Int[Array, "chunks predictions"],
    targets: Int[Array, "chunks predictions"],
) -> tuple[Float[Array, "chunks predictions"], Bool[Array, "chunks predictions"]]:
    """The log-probability of each target at its place in the buffer, and whether no token is likelier."""
    stream = model.unpadded(params, texts)

    def predict(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        places, wanted = chunk
        logits = model.logits(params, model.head(params, stream[places]))
        own = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        return own - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == wanted

    return jax.lax.map(predict, (at, targets))
