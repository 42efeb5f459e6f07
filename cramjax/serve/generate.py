"""Continue text with a causal model: one cached token at a time, in programs whose shapes do not depend on the text.

The rows of a batch share one cache, as long as the model's context if that much is needed. When a row fills the
context, every full row keeps its newest half and the cache is rebuilt: text may go on for ever, seen through a window
that slides by halves.
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, PyTree

from cramjax.compiling import BRIEF, jit
from cramjax.data import Tokenizer
from cramjax.errors import ConfigError, RunError
from cramjax.language_model import LanguageModel, template_of
from cramjax.model import Model
from cramjax.serve.decoding import for_decoding
from cramjax.serve.sampling import Sampling, sample
from cramjax.training.given import Given, language_model

_LEAST_WINDOW = 128
"""Tokens; a longer context gets a cache as long as the prompt and what is to be drawn, in powers of two."""
_LOOK = 16
"""Tokens of each row between two looks at which rows are finished."""


@dataclass(frozen=True)
class Generation:
    """A prompt and how the model went on."""

    prompt: str
    text: str
    """The continuation, without the prompt."""
    tokens: int
    """Tokens drawn, the separator included."""
    stopped: Literal["separator", "length"]
    """Whether the model ended the document or the limit was reached."""

    def __str__(self) -> str:
        return self.prompt + self.text

    def _repr_html_(self) -> str:
        prompt, text = html.escape(self.prompt), html.escape(self.text)
        return f'<pre style="white-space: pre-wrap"><b>{prompt}</b>{text}</pre>'


class _Rows(NamedTuple):
    """What the decoding loop carries."""

    cache: PyTree
    tokens: Int[Array, "batch seq"]
    """The window of each row, right-padded."""
    lengths: Int[Array, " batch"]
    """Tokens known in each window; the cache holds all but the last of them."""
    drawn: Int[Array, " batch"]
    """Tokens drawn since the prompt."""
    done: Bool[Array, " batch"]


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

    Raises:
        ConfigError: a sampling value or `max_tokens` is out of range, or weights cannot be held so.
        RunError: the model is not causal, or has no chat template.
    """
    model = causal_model(given)
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be 1 or more, got {max_tokens}.")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        return []
    sampling = Sampling(temperature, top_k, top_p)
    starts, rows = encoded_prompts(model, texts, chat=chat)
    lengths = [len(row) for row in rows]
    continue_rows(for_decoding(model, weights), rows, max_tokens, sampling, seed)
    return [
        _generation(model.tokenizer, text, row, start, length)
        for text, row, start, length in zip(texts, rows, starts, lengths, strict=True)
    ]


def causal_model(given: Given) -> LanguageModel:
    """The model of a run, a model or the path of one.

    Raises:
        RunError: it does not continue text.
    """
    model = language_model(given)
    model.require_tokens()
    if model.kind == "masked":
        raise RunError(
            f"{model.path} is a masked model, which does not continue text: fill its masks with `fill-mask`."
        )
    if model.kind == "encoder":
        raise RunError(f"{model.path} is an encoder without a head, which does not continue text.")
    return model


def encoded_prompts(model: LanguageModel, texts: Sequence[str], *, chat: bool) -> tuple[list[int], list[list[int]]]:
    """Token ids of prompts as the model is to see them, and where the prompt's own begin in each.

    Args:
        model: a causal one.
        texts: the prompts.
        chat: whether they are what a user says; then the ids go up to where each answer begins.
    """
    if chat:
        template = template_of(model)
        return [0] * len(texts), [template.question([{"role": "user", "content": t}]).tolist() for t in texts]
    encoded = [model.tokenizer.encode(text) for text in texts]
    starts = [model.tokenizer.opening(ids) for ids in encoded]
    return [len(start) for start in starts], [[*start, *ids] for start, ids in zip(starts, encoded, strict=True)]


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
    run = language_model(given)
    window = window_of(run.context, max(map(len, rows)) + max_tokens)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(rows)))
    drawn, done = np.zeros(len(rows), np.int32), np.zeros(len(rows), bool)
    banned = never_drawn(run.tokenizer, run.model.vocab_size)
    starts = [0] * len(rows)  # where the window of each row begins
    begin = run.tokenizer.begin_ids or ()  # which models of others must see first, in every window
    while not done.all():
        starts = [
            start if len(row) - start + len(begin) * (start > 0) < window else len(row) - window // 2
            for row, start in zip(rows, starts, strict=True)
        ]
        kept = [[*begin, *row[start:]] if start else row for row, start in zip(rows, starts, strict=True)]
        lengths = np.array([len(row) for row in kept], np.int32)
        tokens = np.zeros((len(rows), window), np.int32)
        for row, ids in zip(tokens, kept, strict=True):
            row[: len(ids)] = ids
        width = min(window, 1 << int(lengths.max() - 1).bit_length())
        cache = _prefill(run.model, run.params, jnp.asarray(tokens[:, :width]), jnp.asarray(lengths - 1), window)
        state = _Rows(cache, jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(drawn), jnp.asarray(done))
        has_room = True
        while has_room and not done.all():
            most = jnp.int32([max_tokens, max_tokens if finished is None else drawn.max() + _LOOK])
            state = _decode(run.model, sampling, banned, run.tokenizer.ends, run.params, state, most, keys)
            after = jax.device_get(state._replace(cache=None))
            for row, new, old_length, length in zip(rows, after.tokens, lengths, after.lengths, strict=True):
                row.extend(new[old_length:length].tolist())
            lengths, drawn, done = after.lengths, after.drawn, after.done
            if finished is not None:
                done = np.array([is_done or finished(number) for number, is_done in enumerate(done)])
                state = state._replace(done=jnp.asarray(done))
            has_room = bool(np.all(done | (lengths < window)))


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], drawn: Sequence[int]) -> str:
    """The text of the tokens drawn after a prompt's."""
    # Decoding the whole and taking the prompt off keeps the spaces that some tokenizers put between words.
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *drawn])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(drawn)


def window_of(context: int, tokens: int) -> int:
    """Tokens that a cache has room for: the context, or less where less will be needed."""
    return min(context, max(_LEAST_WINDOW, 1 << (tokens - 1).bit_length()))


@partial(jit, seconds=BRIEF, static_argnames=("model", "length"))
def _prefill(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "batch width"],
    counts: Int[Array, " batch"],
    length: int,
) -> PyTree:
    """A cache of `length` that holds the first `counts` tokens of each row."""
    cache = model.init_cache(len(tokens), length, params)
    return model.decode(params, cache, tokens, counts)[1]


@partial(jit, seconds=BRIEF, static_argnames=("model", "sampling", "banned", "ends"), donate_argnames="rows")
def _decode(
    model: Model,
    sampling: Sampling,
    banned: tuple[int, ...],
    ends: tuple[int, ...],
    params: PyTree,
    rows: _Rows,
    most: Int[Array, "2"],
    keys: Key[Array, " batch"],
) -> _Rows:
    """Draw tokens until every row is done, or one that is not fills its window or has all that are asked for now.

    `most` are the tokens after which a row is done, and those after which to come back. All rows that are not done have
    drawn equally many.
    """
    batch, window = rows.tokens.shape
    index = jnp.arange(batch)

    def going_on(rows: _Rows) -> Bool[Array, ""]:
        return ~jnp.all(rows.done) & jnp.all(rows.done | ((rows.lengths < window) & (rows.drawn < most[1])))

    def draw(rows: _Rows) -> _Rows:
        active = ~rows.done
        newest = rows.tokens[index, rows.lengths - 1]
        hidden, cache = model.decode(params, rows.cache, newest[:, None], active.astype(jnp.int32))
        logits = model.logits(params, hidden[:, 0]).at[:, jnp.asarray(banned, jnp.int32)].set(-jnp.inf)
        token = sample(logits, jax.vmap(jax.random.fold_in)(keys, rows.drawn), sampling)
        lengths, drawn = rows.lengths + active, rows.drawn + active
        tokens = rows.tokens.at[index, jnp.where(active, rows.lengths, window)].set(token, mode="drop")
        done = rows.done | (active & (jnp.isin(token, jnp.asarray(ends)) | (drawn >= most[0])))
        return _Rows(cache, tokens, lengths, drawn, done)

    return jax.lax.while_loop(going_on, draw, rows)


def never_drawn(tokenizer: Tokenizer, rows: int) -> tuple[int, ...]:
    """Special tokens that no text holds, so that a causal model has not learned to avoid them, and rows of the
    vocabulary that are no token.
    """
    special = {tokenizer.mask_id, tokenizer.pad_id} - {None, *tokenizer.ends}
    return tuple(sorted([*(token for token in special if token is not None), *range(tokenizer.vocab_size, rows)]))


def _generation(tokenizer: Tokenizer, prompt: str, row: list[int], start: int, stop: int) -> Generation:
    """What was made of a prompt, whose own tokens stand from `start` to `stop` in the row."""
    ended = len(row) > stop and row[-1] in tokenizer.ends
    return Generation(
        prompt=prompt,
        text=text_after(tokenizer, row[start:stop], row[stop:-1] if ended else row[stop:]),
        tokens=len(row) - stop,
        stopped="separator" if ended else "length",
    )
