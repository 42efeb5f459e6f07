"""Continue text with a causal model: one cached token at a time, in programs whose shapes do not depend on the text.

The rows of a batch share one cache of the training sequence length. When a row fills it, every full row keeps its
newest half and the cache is rebuilt: text may go on for ever, seen through a window that slides by halves.
"""

import html
from collections.abc import Sequence
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
from cramjax.model import Model
from cramjax.serve.sampling import Sampling, sample
from cramjax.training import Run


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
    run: Run,
    prompts: str | Sequence[str],
    *,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[Generation]:
    """Continue each prompt until the model ends the document or `max_tokens` are drawn.

    Prompts are decoded together. The draws of a prompt depend on the seed and on its place in the list, not on the
    prompts beside it.

    Args:
        run: a loaded causal run.
        prompts: one text or several; the empty text starts a document.
        max_tokens: most tokens drawn for each prompt.
        temperature: 0 takes the likeliest token every time.
        top_k: draw from this many likeliest tokens only.
        top_p: draw from the likeliest tokens that together reach this probability only.
        seed: seed of the draws.

    Raises:
        ConfigError: a sampling value or `max_tokens` is out of range.
        RunError: the run is not causal.
    """
    if run.config.objective.kind != "causal":
        raise RunError(f"{run.path} is a masked model, which does not continue text: fill its masks with `fill-mask`.")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be 1 or more, got {max_tokens}.")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        return []
    sampling = Sampling(temperature, top_k, top_p)
    tokenizer = run.tokenizer
    prompt_ids = [[tokenizer.separator_id, *tokenizer.encode(text)] for text in texts]
    rows = [list(ids) for ids in prompt_ids]
    continue_rows(run, rows, max_tokens, sampling, seed)
    return [_generation(tokenizer, text, ids, row) for text, ids, row in zip(texts, prompt_ids, rows, strict=True)]


def continue_rows(run: Run, rows: list[list[int]], max_tokens: int, sampling: Sampling, seed: int) -> None:
    """Append tokens to each row until a separator is drawn or `max_tokens` are.

    Args:
        run: a loaded causal run.
        rows: token ids, at least one each; changed in place.
        max_tokens: most tokens appended to each row.
        sampling: how tokens are drawn.
        seed: seed of the draws.
    """
    window = run.config.data.sequence_length
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(rows)))
    drawn, done = np.zeros(len(rows), np.int32), np.zeros(len(rows), bool)
    banned = _never_drawn(run.tokenizer)
    starts = [0] * len(rows)  # where the window of each row begins
    while not done.all():
        starts = [
            start if len(row) - start < window else len(row) - window // 2
            for row, start in zip(rows, starts, strict=True)
        ]
        kept = [row[start:] for row, start in zip(rows, starts, strict=True)]
        lengths = np.array([len(row) for row in kept], np.int32)
        tokens = np.zeros((len(rows), window), np.int32)
        for row, ids in zip(tokens, kept, strict=True):
            row[: len(ids)] = ids
        width = min(window, 1 << int(lengths.max() - 1).bit_length())
        cache = _prefill(run.model, run.params, jnp.asarray(tokens[:, :width]), jnp.asarray(lengths - 1), window)
        state = _Rows(cache, jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(drawn), jnp.asarray(done))
        state = _decode(
            run.model, sampling, banned, run.tokenizer.separator_id, run.params, state, jnp.int32(max_tokens), keys
        )
        after = jax.device_get(state._replace(cache=None))
        for row, new, old_length, length in zip(rows, after.tokens, lengths, after.lengths, strict=True):
            row.extend(new[old_length:length].tolist())
        drawn, done = after.drawn, after.done


@partial(jit, seconds=BRIEF, static_argnames=("model", "length"))
def _prefill(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "batch width"],
    counts: Int[Array, " batch"],
    length: int,
) -> PyTree:
    """A cache of `length` that holds the first `counts` tokens of each row."""
    cache = model.init_cache(len(tokens), length)
    return model.decode(params, cache, tokens, counts)[1]


@partial(jit, seconds=BRIEF, static_argnames=("model", "sampling", "banned", "separator_id"), donate_argnames="rows")
def _decode(
    model: Model,
    sampling: Sampling,
    banned: tuple[int, ...],
    separator_id: int,
    params: PyTree,
    rows: _Rows,
    max_tokens: Int[Array, ""],
    keys: Key[Array, " batch"],
) -> _Rows:
    """Draw tokens until every row is done or one that is not fills its window."""
    batch, window = rows.tokens.shape
    index = jnp.arange(batch)

    def going_on(rows: _Rows) -> Bool[Array, ""]:
        return ~jnp.all(rows.done) & jnp.all(rows.done | (rows.lengths < window))

    def draw(rows: _Rows) -> _Rows:
        active = ~rows.done
        newest = rows.tokens[index, rows.lengths - 1]
        hidden, cache = model.decode(params, rows.cache, newest[:, None], active.astype(jnp.int32))
        logits = model.logits(params, hidden[:, 0]).at[:, jnp.asarray(banned, jnp.int32)].set(-jnp.inf)
        token = sample(logits, jax.vmap(jax.random.fold_in)(keys, rows.drawn), sampling)
        lengths, drawn = rows.lengths + active, rows.drawn + active
        tokens = rows.tokens.at[index, jnp.where(active, rows.lengths, window)].set(token, mode="drop")
        done = rows.done | (active & ((token == separator_id) | (drawn >= max_tokens)))
        return _Rows(cache, tokens, lengths, drawn, done)

    return jax.lax.while_loop(going_on, draw, rows)


def _never_drawn(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Special tokens that no text holds, so that a causal model has not learned to avoid them."""
    special = {tokenizer.mask_id, tokenizer.pad_id} - {None, tokenizer.separator_id}
    return tuple(sorted(token for token in special if token is not None))


def _generation(tokenizer: Tokenizer, prompt: str, prompt_ids: list[int], row: list[int]) -> Generation:
    ended = len(row) > len(prompt_ids) and row[-1] == tokenizer.separator_id
    # Decoding the whole and taking the prompt off keeps the spaces that some tokenizers put between words.
    before = tokenizer.decode(prompt_ids[1:])
    whole = tokenizer.decode(row[1:-1] if ended else row[1:])
    return Generation(
        prompt=prompt,
        text=whole[len(before) :] if whole.startswith(before) else tokenizer.decode(row[len(prompt_ids) :]),
        tokens=len(row) - len(prompt_ids),
        stopped="separator" if ended else "length",
    )
