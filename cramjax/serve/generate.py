"""Continue text with a causal model: what the engine draws for some prompts, as text.

Prompts are rows of one batch, whose programs have shapes that do not depend on the text. When a row fills the context,
its newest half is read anew: text may go on for ever, seen through a window that slides by halves.
"""

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from cramjax.errors import ConfigError
from cramjax.language_model import LanguageModel
from cramjax.serve.constraints import constraints_for
from cramjax.serve.decoding import for_decoding
from cramjax.serve.engine import Engine
from cramjax.serve.engine.batch import few_shapes
from cramjax.serve.engine.draft import draft_model
from cramjax.serve.prompts import causal_model, encoded_prompts, window_of
from cramjax.serve.request import Constraint, Progress, Request, SamplingParameters
from cramjax.serve.sampling import Sampling
from cramjax.serve.text import TextStream
from cramjax.serving import EngineConfig
from cramjax.training.given import Given, language_model

_MOST_BYTES, _LEAST_ROWS = 2 << 30, 8
"""Bytes that rows together may take for what they hold, where there are more than a few of them."""
_BYTES_OF_WORD = 13
"""Bytes that a row has for each word of the vocabulary: what penalties read (9), and a logit."""


@dataclass(frozen=True)
class Generation:
    """A prompt and how the model went on."""

    prompt: str
    text: str
    """The continuation, without the prompt."""
    tokens: int
    """Tokens drawn, the separator included."""
    stopped: Literal["separator", "shape", "length", "stuck"]
    """Whether the model ended the document, the text has the shape asked for, the limit was reached, or no token could
    come next that the shape allows."""
    guessed: int = 0
    """Tokens that were guessed on the way."""
    right: int = 0
    """Guesses that the model drew too."""

    def __str__(self) -> str:
        return self.prompt + self.text

    def _repr_html_(self) -> str:
        prompt, text = html.escape(self.prompt), html.escape(self.text)
        return f'<pre style="white-space: pre-wrap"><b>{prompt}</b>{text}</pre>'


class Drawn(NamedTuple):
    """What was drawn for a row since the last time."""

    number: int
    """Of the row."""
    tokens: tuple[int, ...]
    guessed: int
    right: int
    is_last: bool
    is_stuck: bool
    """Whether no token is allowed any more."""


def generate(
    given: Given,
    prompts: str | Sequence[str],
    *,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    weights: str = "auto",
    lookup: int = 0,
    draft: Given | None = None,
    json_schema: Mapping[str, Any] | str | None = None,
    regex: str | None = None,
    told: Callable[[int, str, bool], None] | None = None,
) -> list[Generation]:
    """Continue each prompt until the model ends the document or `max_tokens` are drawn.

    Prompts are decoded together. The draws of a prompt depend on the seed and on its place in the list, not on the
    prompts beside it.

    Args:
        given: a causal run or model, or the path of one.
        prompts: one text or several; the empty text starts a document.
        max_tokens: most tokens drawn for each prompt.
        temperature: 0 takes the likeliest token every time.
        top_k: draw from this many likeliest tokens only.
        top_p: draw from the likeliest tokens that together reach this probability only.
        seed: seed of the draws.
        chat: take each prompt for what a user says, and let the model answer, by its chat template.
        weights: how they are held meanwhile, as of `for_decoding`.
        lookup: tokens guessed at once where a text repeats itself; the answer is the same.
        draft: a smaller model with the same tokenizer, that guesses what this one verifies; the answer is the same.
        json_schema: what each text is JSON of, or begins to be: a schema, or its text. Needs llguidance.
        regex: the regular expression that each is a text of. Needs llguidance.
        told: is told each piece of text as it comes: its prompt's place in the list, the piece, whether it is the last.

    Raises:
        ConfigError: a sampling value or `max_tokens` is out of range, or weights cannot be held so.
        RunError: the model is not causal, or has no chat template.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    found: list[Generation | None] = [None] * len(texts)
    sampling = Sampling(temperature, top_k, top_p)
    shape = json_schema, regex
    for number, piece, whole in _answers(given, texts, max_tokens, sampling, seed, chat, weights, lookup, draft, shape):
        if told is not None:
            told(number, piece, whole is not None)
        found[number] = whole
    return [each for each in found if each is not None]


def stream(
    given: Given,
    prompt: str = "",
    *,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    weights: str = "auto",
    lookup: int = 0,
    draft: Given | None = None,
) -> Iterator[str]:
    """The text of `generate` for one prompt, piece by piece as it is drawn.

    Args:
        given: as of `generate`.
        prompt: one text.
        max_tokens: as of `generate`, like all that follow.
        temperature: 0 takes the likeliest token every time.
        top_k: draw from this many likeliest tokens only.
        top_p: draw from the likeliest tokens that together reach this probability only.
        seed: seed of the draws.
        chat: take the prompt for what a user says.
        weights: how they are held meanwhile.
        lookup: tokens guessed at once where a text repeats itself.
        draft: a smaller model that guesses.

    Raises:
        ConfigError: as `generate`, when the first piece is asked for.
        RunError: likewise.
    """
    sampling = Sampling(temperature, top_k, top_p)
    for _, piece, _ in _answers(given, [prompt], max_tokens, sampling, seed, chat, weights, lookup, draft):
        if piece:
            yield piece


def _answers(
    given: Given,
    texts: Sequence[str],
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    chat: bool,
    weights: str,
    lookup: int,
    draft: Given | None,
    shape: tuple[Mapping[str, Any] | str | None, str | None] = (None, None),
) -> Iterator[tuple[int, str, Generation | None]]:
    """Pieces of text with the numbers of their prompts, as they come; with the last piece of each, the whole."""
    model = causal_model(given)
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be 1 or more, got {max_tokens}.")
    if lookup < 0:
        raise ConfigError(f"lookup must be 1 or more tokens, or 0 for none, got {lookup}.")
    starts, rows = encoded_prompts(model, texts, chat=chat)
    own = [row[start:] for row, start in zip(rows, starts, strict=True)]
    streams = [TextStream(model.tokenizer, prompt) for prompt in own]
    written, tokens, guessed, right = ([""] * len(rows), *([0] * len(rows) for _ in range(3)))
    shapes = constraints_for(model.tokenizer, len(rows), *shape)
    options: dict[str, Any] = {"lookup": lookup, "draft": draft_model(draft, weights), "constraints": shapes}
    for drawn in draws(for_decoding(model, weights), rows, max_tokens, sampling, seed, **options):
        number = drawn.number
        tokens[number] += len(drawn.tokens)
        guessed[number] += drawn.guessed
        right[number] += drawn.right
        ended = bool(drawn.tokens) and drawn.tokens[-1] in model.tokenizer.ends
        piece = "".join(map(streams[number].add, drawn.tokens[:-1] if ended else drawn.tokens))
        piece += streams[number].end() if drawn.is_last else ""
        written[number] += piece
        whole = None
        if drawn.is_last:
            own_shape = shapes[number]
            has_shape = own_shape is not None and own_shape.is_over
            why: Literal["separator", "shape", "length", "stuck"]
            why = "separator" if ended else "shape" if has_shape else "stuck" if drawn.is_stuck else "length"
            whole = Generation(texts[number], written[number], tokens[number], why, guessed[number], right[number])
        yield number, piece, whole


def continue_rows(
    given: Given,
    rows: list[list[int]],
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    finished: Callable[[int], bool] | None = None,
) -> None:
    """Append tokens to each row until one that ends the text is drawn or `max_tokens` are.

    Args:
        given: a causal run or model, or the path of one.
        rows: token ids, at least one each; changed in place.
        max_tokens: most tokens appended to each row.
        sampling: how tokens are drawn.
        seed: seed of the draws.
        finished: whether the row of a number needs no more tokens. It is asked after every few, so that some of a row's
            tokens may be too many. Default: no row is.
    """
    for _ in draws(language_model(given), rows, max_tokens, sampling, seed, finished):
        pass


def _rows_at_once(model: LanguageModel, rows: int, window: int) -> int:
    """Rows that are continued beside each other; the others wait for one to end."""
    stack = model.model
    token = len(stack.period) * stack.repeats * 2 * stack.sizes.kv_heads * stack.sizes.head_dim
    cache = window * token * jnp.dtype(stack.compute_dtype).itemsize
    return min(rows, max(_MOST_BYTES // (cache + _BYTES_OF_WORD * stack.vocab_size), _LEAST_ROWS))


def draws(
    model: LanguageModel,
    rows: list[list[int]],
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    finished: Callable[[int], bool] | None = None,
    *,
    lookup: int = 0,
    draft: LanguageModel | None = None,
    constraints: Sequence[Constraint | None] | None = None,
) -> Iterator[Drawn]:
    """Append tokens to each row as `continue_rows` does, and give them as they come; the last of a row says so.

    Only the programs that these rows need are compiled, and only where no earlier call did.

    Args:
        model: a causal one.
        rows: as of `continue_rows`, like all that follow.
        max_tokens: most tokens appended to each row.
        sampling: how tokens are drawn.
        seed: seed of the draws.
        finished: whether a row needs no more tokens.
        lookup: tokens guessed at once where a text repeats itself.
        draft: a model that guesses.
        constraints: what the tokens of each row may be. Default: anything.
    """
    if not rows:
        return
    longest = max(map(len, rows))
    window = window_of(model.context, longest + max_tokens)
    slides = longest + max_tokens > window
    slots = _rows_at_once(model, len(rows), window)
    config = EngineConfig(
        slots=slots,
        context=window,
        cache_tokens=slots * window,
        prefix_cache=False,
        lookup=lookup,
        draft=None if draft is None else str(draft.path),
    )
    shapes = few_shapes(config, model, max(longest, window // 2 if slides else 0), draft)
    engine, news = Engine(model, config, shapes, draft), list[tuple[int, Progress]]()
    begin = model.tokenizer.begin_ids or ()  # which models of others must see first, in every window
    prompts, numbers = list(map(len, rows)), [0] * len(rows)

    def ask(number: int) -> None:
        row, drawn = rows[number], len(rows[number]) - prompts[number]
        seen = row if len(row) < window else [*begin, *row[-(window // 2) :]]
        # Rows draw apart from each other: the number is the other half of the seed.
        way = SamplingParameters(
            sampling.temperature, sampling.top_k or 0, sampling.top_p or 1.0, seed=number << 32 | seed & 0xFFFFFFFF
        )
        most = min(max_tokens - drawn, window - len(seen))
        shape = None if constraints is None else constraints[number]
        request = Request(tuple(seen), most, way, frozenset(model.tokenizer.ends), constraint=shape, drawn=drawn)
        numbers[number] = engine.add(request, lambda progress: news.append((number, progress)))

    for number in range(len(rows)):
        ask(number)
    while engine.step():
        came, news[:] = list(news), []
        for number, progress in came:
            row = rows[number]
            row += progress.tokens
            full = progress.reason == "length" and len(row) - prompts[number] < max_tokens
            enough = finished is not None and finished(number)
            if full and not enough:
                ask(number)
            elif enough and progress.reason is None:
                engine.cancel(numbers[number])
                news.clear()
            is_last = enough or (progress.reason is not None and not full)
            yield Drawn(number, progress.tokens, progress.guessed, progress.right, is_last, progress.reason == "stuck")
