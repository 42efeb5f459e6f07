"""The two functions of the engine, pure: `prefill` reads pieces of prompts, `step` draws tokens one after the other.

Both go through `cramjax.model.decode` with a cache in pages. A batch has a fixed number of rows, of which some may be
nobody's: these have no tokens, and write nothing.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from cramjax.errors import ConfigError
from cramjax.kernels.largest import largest, likeliest
from cramjax.model import Model
from cramjax.model.cache import Paged
from cramjax.model.coded_pages import CodedPages
from cramjax.model.decode import TextCache, prompted
from cramjax.serve.engine.draw import History, Ways, draw

MOST_STEPS = 16
"""Tokens that a call of `step` can draw for a row."""
TOP = 20
"""Likeliest tokens whose log-probabilities are given."""
STOPS = 16
"""Tokens that end a row on the device; of more, the host looks for the rest."""
_NO_SLOT = 1 << 30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool:
    """What is on the device between calls; donated to each, and given back."""

    pages: tuple[Paged | CodedPages, ...]
    """Keys and values of each block of a period, without the tables of rows."""
    history: History
    draft: tuple[Paged | CodedPages, ...] = ()
    """Those of a draft model's blocks, in pages of the same numbers."""

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.pages[0].keys.shape[2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """A batch: what each row holds and wants. Arrays of (batch,) but where said."""

    tokens: Any
    """The next tokens, int32 (batch, n)."""
    counts: Any
    """How many of the n are real; 0: nobody's row."""
    held: Any
    """Tokens whose keys and values are in the pages, those of a prompt of virtual ones among them."""
    last: Any
    """The last of these; -1: there is none."""
    segment: Any
    """Its document."""
    segments: Any
    """Documents of all of them, int32 (batch, places); (batch, 0) where the model does not ask."""
    table: Any
    """Pages, int32 (batch, pages of a row)."""
    slots: Any
    """Row of the history."""
    drawn: Any
    """Tokens drawn before this call."""
    room: Any
    """Tokens that may be drawn yet."""
    stops: Any
    """Tokens that end the row, int32 (batch, STOPS); -1: none."""
    logprobs: Any
    """Whether log-probabilities are wanted."""
    ways: Ways
    """How tokens are drawn."""
    allowed: Any
    """Which tokens may be drawn next, a bit each, int32 (batch, words)."""
    constrained: Any
    """Whether any may not."""
    virtual: int = field(default=0, metadata={"static": True})
    """Tokens of a prompt that every row begins with."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Of tokens, and of the likeliest ones in their places: (…), (…, TOP), (…, TOP); zeros where nobody wants them."""

    of_token: Any
    top: Any
    top_tokens: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """What a call drew."""

    tokens: Any
    """Int32 (batch, n)."""
    counts: Any
    """How many of the n each row drew."""
    logprobs: Logprobs
    """(batch, n)."""
    scored: Any = None
    """`Logprobs` of the tokens that a prompt goes on with, where asked for: (batch, tokens)."""


def make_pool(
    model: Model,
    pages: int,
    size: int,
    slots: int,
    draft: Model | None = None,
    *,
    bits: int | None = None,
    guesses: int = 0,
) -> Pool:
    """An empty pool of pages, and a history.

    Args:
        model: whose keys and values it holds.
        pages: of the pool.
        size: tokens of a page.
        slots: rows that are on their way at once.
        draft: a model that guesses, whose keys and values are held in full.
        bits: of a key's or value's number; None: in full.
        guesses: tokens that are held at once and may be taken back.

    Raises:
        ConfigError: heads whose codes do not fill bytes.
    """
    if bits is not None and model.sizes.head_dim * bits % 8:
        raise ConfigError(
            f"engine.cache_bits={bits} needs heads whose channels fill whole bytes, and this model's have "
            f"{model.sizes.head_dim}: use 8."
        )

    def empty(model: Model, bits: int | None) -> tuple[Paged | CodedPages, ...]:
        shape = model.repeats, pages, size, model.sizes.kv_heads, model.sizes.head_dim
        kind = model.compute_dtype
        if bits is None:
            return tuple(Paged(jnp.zeros(shape, kind), jnp.zeros(shape, kind)) for _ in model.period)
        return tuple(CodedPages.made(shape, slots, size + guesses, kind, bits) for _ in model.period)

    history = History.empty(slots, model.vocab_size)
    return Pool(empty(model, bits), history, () if draft is None else empty(draft, None))


def default_tokens(
    model: Model, context: int, slots: int, size: int, *, bits: int | None = None, guesses: int = 0
) -> int:
    """Tokens that a pool holds where nothing is said: four contexts, or as many as there are slots; in few bits, what
    the memory of those holds, but one context at least.

    Args:
        model: whose keys and values they are.
        context: tokens of a request.
        slots: rows that are on their way at once.
        size: tokens of a page.
        bits: as of `make_pool`, like `guesses`.
    """
    tokens = min(slots, 4) * context
    if bits is None:
        return tokens
    full, coded = (_page_bytes(model, size, own) for own in (None, bits))
    newest = slots * (size + guesses)
    return max(context, (tokens - newest) * full // coded)


def _page_bytes(model: Model, size: int, bits: int | None) -> int:
    """Of a page, in all blocks."""
    pool = jax.eval_shape(lambda: make_pool(model, 1, size, 1, bits=bits))
    arrays = jax.tree.leaves([(block.keys, block.values) for block in pool.pages])
    return sum(x.size * x.dtype.itemsize for x in arrays)


def hold_prompt(model: Model, params: PyTree, pool: Pool, table: Int[Array, "1 pages"]) -> Pool:
    """The virtual tokens of a prompt, held once for all rows.

    Args:
        model: a causal model; static.
        params: of the model, with a prompt.
        pool: donated.
        table: the prompt's pages.
    """
    row = jnp.zeros(1, jnp.int32)
    places = jnp.zeros((1, table.shape[1] * pool.page), jnp.int32)
    cache = prompted(model, params, TextCache(_blocks(pool.pages, table, row + _NO_SLOT), places, row, row - 1, row))
    return replace(pool, pages=_pages(cache))


def begin(nothing: None, pool: Pool, *what: Any) -> Pool:
    """A slot's history begins, as of `History.begun`."""
    del nothing
    return replace(pool, history=pool.history.begun(*what))


def prefill(
    model: Model, banned: tuple[int, ...], score: bool, params: PyTree, pool: Pool, rows: Rows, targets: Any
) -> tuple[Pool, Drawn]:
    """Hold the next tokens of each row, and draw one after them where there is room for one.

    Args:
        model: a causal model; static.
        banned: tokens never drawn; static.
        score: whether log-probabilities of `targets` are wanted; static.
        params: of the model.
        pool: donated.
        rows: the batch; of a row that is not at its end yet, `room` is 0.
        targets: the tokens that come after each of `rows.tokens`, (batch, n), if `score`; else None.
    """
    cache, hidden = _extended(model, params, pool, rows)
    final = hidden[jnp.arange(len(hidden)), jnp.maximum(rows.counts - 1, 0)]
    active = (rows.counts > 0) & (rows.room > 0)
    token, logprobs, history = _drawn(model, banned, params, pool.history, final, rows, rows.drawn, active)
    scored = None
    if score:
        every = jax.nn.log_softmax(model.logits(params, hidden).astype(jnp.float32), axis=-1)
        scored = _logprobs(every, targets)
    first = jax.tree.map(lambda each: each[:, None], logprobs)
    pool = replace(pool, pages=_pages(cache), history=history)
    return pool, Drawn(token[:, None], active.astype(jnp.int32), first, scored)


def step(
    model: Model, banned: tuple[int, ...], params: PyTree, pool: Pool, rows: Rows, most: Int[Array, ""]
) -> tuple[Pool, Drawn]:
    """Draw up to `most` tokens for each row, one after the other, each held before the next is drawn.

    Args:
        model: a causal model; static.
        banned: tokens never drawn; static.
        params: of the model.
        pool: donated.
        rows: the batch; `tokens` is the newest of each (batch, 1), which is not held yet.
        most: at most `MOST_STEPS`; the pages of each row have room for so many more. 1, if any row is constrained.
    """
    batch = len(rows.counts)
    shape = batch, MOST_STEPS
    top = min(TOP, model.vocab_size)
    nothing = Logprobs(jnp.zeros(shape), jnp.zeros((*shape, top)), jnp.zeros((*shape, top), jnp.int32))
    out = Drawn(jnp.zeros(shape, jnp.int32), jnp.zeros(batch, jnp.int32), nothing)
    active = (rows.counts > 0) & (rows.room > 0)

    def going_on(carry: tuple[Any, ...]) -> Bool[Array, ""]:
        number, _, _, _, active, _ = carry
        return (number < most) & jnp.any(active)

    def turn(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        number, pool, cache, newest, active, out = carry
        held = replace(cache, blocks=_blocks(pool.pages, rows.table, rows.slots))
        hidden, cache = model.decode(params, held, newest[:, None], active.astype(jnp.int32))
        pages = _pages(cache)
        token, logprobs, history = _drawn(
            model, banned, params, pool.history, hidden[:, 0], rows, rows.drawn + out.counts, active
        )
        put = Logprobs(
            *(
                getattr(out.logprobs, name).at[:, number].set(getattr(logprobs, name))
                for name in ("of_token", "top", "top_tokens")
            )
        )
        counts = out.counts + active
        tokens = out.tokens.at[:, number].set(token)
        ended = jnp.any(token[:, None] == rows.stops, axis=1) | (counts >= rows.room)
        cache = replace(cache, blocks=())
        pool = replace(pool, pages=pages, history=history)
        return number + 1, pool, cache, token, active & ~ended, Drawn(tokens, counts, put)

    start = jnp.int32(0), pool, replace(_text_cache(rows, pool.page), blocks=()), rows.tokens[:, 0], active, out
    _, pool, _, _, _, out = jax.lax.while_loop(going_on, turn, start)
    return pool, out


def verify(model: Model, banned: tuple[int, ...], params: PyTree, pool: Pool, rows: Rows) -> tuple[Pool, Drawn]:
    """Draw a token after the newest and after each guess, up to the first that is not the guess in its place.

    Args:
        model: a causal model; static.
        banned: tokens never drawn; static.
        params: of the model.
        pool: donated; what it holds of wrong guesses is written over later.
        rows: the batch; `tokens` is the newest of each, which is not held yet, and guesses of those after it. Rows
            whose logits depend on what was drawn, or that are constrained, have none.
    """
    cache, hidden = _extended(model, params, pool, rows)
    batch, count = rows.tokens.shape
    logits = model.logits(params, hidden).astype(jnp.float32)
    each = jax.tree.map(lambda own: jnp.repeat(own, count, axis=0), rows)
    numbers = (rows.drawn[:, None] + jnp.arange(count)).reshape(-1)
    tokens = _chosen(logits.reshape(batch * count, -1), banned, each, pool.history, numbers).reshape(batch, count)
    real = jnp.arange(1, count) < rows.counts[:, None]
    right = jnp.cumprod((tokens[:, :-1] == rows.tokens[:, 1:]) & real, axis=1).sum(axis=1)
    active = (rows.counts > 0) & (rows.room > 0)
    counts = jnp.where(active, jnp.minimum(right + 1, rows.room), 0)
    logprobs = _where_wanted(logits, banned, tokens, rows.logprobs & active)
    slots = jnp.where(rows.ways.history & active, rows.slots, len(pool.history.drawn))
    history = replace(pool.history, drawn=pool.history.drawn.at[slots, tokens[:, 0]].add(1, mode="drop"))
    return replace(pool, pages=_pages(cache), history=history), Drawn(tokens, counts, logprobs)


def follow(draft: Model, params: PyTree, pool: Pool, rows: Rows) -> Pool:
    """Hold the next tokens of each row for a draft model.

    Args:
        draft: the model that guesses; static.
        params: of it.
        pool: donated.
        rows: the batch, as far as the draft model has come.
    """
    cache = replace(_text_cache(rows, pool.page), blocks=_blocks(pool.draft, rows.table, rows.slots))
    return replace(pool, draft=_pages(draft.decode(params, cache, rows.tokens, rows.counts)[1]))


def speculate(
    model: Model, draft: Model, banned: tuple[int, ...], params: tuple[PyTree, PyTree], pool: Pool, rows: Rows
) -> tuple[Pool, Drawn]:
    """Let a draft model guess what each row goes on with, and verify that.

    The draft draws with the noise that the model draws with (one of Gumbel's distribution for each token of the
    vocabulary, from seed and number), so that both draw the same where they think alike, and what is answered is what
    would have been without a draft.

    Args:
        model: a causal model; static.
        draft: the model that guesses; static.
        banned: tokens never drawn; static.
        params: of both.
        pool: donated.
        rows: as of `verify`, with room for guesses, whatever they are now, after the newest token of each.

    Source: Leviathan et al. 2023, arXiv:2211.17192; the noise in common, which takes the place of its rule of
    rejection: Daliri, Musco and Suresh 2024, arXiv:2408.07978.
    """
    own, drafts = params
    start = replace(_text_cache(rows, pool.page), blocks=_blocks(pool.draft, rows.table, rows.slots))

    def turn(carry: tuple[TextCache, Array], number: Array) -> tuple[tuple[TextCache, Array], Array]:
        cache, newest = carry
        hidden, cache = draft.decode(drafts, cache, newest[:, None], (rows.counts > number).astype(jnp.int32))
        logits = _as_wide(draft.logits(drafts, hidden[:, 0]).astype(jnp.float32), model.vocab_size)
        allowed = logits.at[:, jnp.asarray(banned, jnp.int32)].set(-jnp.inf)
        token = draw(allowed, rows.ways, pool.history, rows.slots, rows.drawn + number)
        return (cache, token), token

    # The last guess is held too: if all are right, the draft has missed nothing.
    numbers = jnp.arange(rows.tokens.shape[1])
    (cache, _), guesses = jax.lax.scan(turn, (start, rows.tokens[:, 0]), numbers)
    tokens = jnp.concatenate([rows.tokens[:, :1], guesses[:-1].T], axis=1)
    return verify(model, banned, own, replace(pool, draft=_pages(cache)), replace(rows, tokens=tokens))


def _as_wide(logits: Float[Array, "batch own"], vocab: int) -> Float[Array, "batch vocab"]:
    """Logits of a vocabulary, of whose rows one past its tokens may be missing or too many."""
    missing = max(vocab - logits.shape[1], 0)
    return jnp.pad(logits[:, :vocab], ((0, 0), (0, missing)), constant_values=-jnp.inf)


def _blocks(pages: tuple[Paged | CodedPages, ...], table: Array, slots: Array) -> tuple[Paged | CodedPages, ...]:
    """Caches of the rows that have these pages and slots."""
    return tuple(
        replace(own, table=table, slots=slots) if isinstance(own, CodedPages) else replace(own, table=table)
        for own in pages
    )


def _pages(cache: TextCache) -> tuple[Any, ...]:
    """What stays of them when the rows are gone."""
    return tuple(
        replace(own, table=None, slots=None) if isinstance(own, CodedPages) else replace(own, table=None)
        for own in cache.blocks
    )


def _text_cache(rows: Rows, size: int) -> TextCache:
    """Of the rows, without their blocks."""
    segments = rows.segments
    if not segments.shape[1]:
        segments = jnp.zeros((len(rows.counts), rows.table.shape[1] * size), jnp.int32)
    return TextCache((), segments, rows.segment, rows.last, rows.held, rows.virtual)


def _extended(
    model: Model, params: PyTree, pool: Pool, rows: Rows
) -> tuple[TextCache, Float[Array, "batch seq embed"]]:
    cache = replace(_text_cache(rows, pool.page), blocks=_blocks(pool.pages, rows.table, rows.slots))
    hidden, cache = model.decode(params, cache, rows.tokens, rows.counts)
    return cache, hidden


def _drawn(
    model: Model,
    banned: tuple[int, ...],
    params: PyTree,
    history: History,
    hidden: Float[Array, "batch embed"],
    rows: Rows,
    numbers: Int[Array, " batch"],
    active: Bool[Array, " batch"],
) -> tuple[Int[Array, " batch"], Logprobs, History]:
    """A token for each row that is active, its log-probabilities, and a history that has it."""
    logits = model.logits(params, hidden).astype(jnp.float32)
    token = _chosen(logits, banned, rows, history, numbers)
    given = _where_wanted(logits, banned, token, rows.logprobs & active)
    slots = jnp.where(rows.ways.history & active, rows.slots, len(history.drawn))
    return token, given, replace(history, drawn=history.drawn.at[slots, token].add(1, mode="drop"))


def _chosen(
    logits: Float[Array, "batch vocab"],
    banned: tuple[int, ...],
    rows: Rows,
    history: History,
    numbers: Int[Array, " batch"],
) -> Int[Array, " batch"]:
    """A token for each row. Where none asks for more than the likeliest, logits are read once, and copied nowhere."""
    never = np.isin(np.arange(logits.shape[1]), banned)

    def plainly(logits: Array) -> Array:
        return likeliest(jnp.where(never, -jnp.inf, logits))

    def as_wanted(logits: Array) -> Array:
        allowed = _only(jnp.where(never, -jnp.inf, logits), rows.allowed, rows.constrained)
        return draw(allowed, rows.ways, history, rows.slots, numbers)

    wants = rows.constrained | rows.ways.history | (rows.ways.temperature > 0)
    return jax.lax.cond(jnp.any(wants), as_wanted, plainly, logits)


def _only(
    logits: Float[Array, "batch vocab"], allowed: Int[Array, "batch words"], constrained: Bool[Array, " batch"]
) -> Float[Array, "batch vocab"]:
    """Logits of the tokens whose bits are set, if any row is constrained: it costs nothing where none is."""

    def only(logits: Array) -> Array:
        bits = (allowed[:, :, None] >> jnp.arange(32)) & 1
        return jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)

    return jax.lax.cond(jnp.any(constrained), only, lambda logits: logits, logits)


def _where_wanted(
    logits: Float[Array, "*batch vocab"],
    banned: tuple[int, ...],
    tokens: Int[Array, "*batch"],
    wanted: Bool[Array, " batch"],
) -> Logprobs:
    """Log-probabilities of tokens, and of the likeliest that can be drawn, if any row wants them."""
    never = np.isin(np.arange(logits.shape[-1]), banned)

    def logprobs(logits: Array) -> Logprobs:
        return _logprobs(jnp.where(never, -jnp.inf, jax.nn.log_softmax(logits, axis=-1)), tokens)

    empty = jax.eval_shape(logprobs, logits)
    return jax.lax.cond(
        jnp.any(wanted), logprobs, lambda _: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), empty), logits
    )


def _logprobs(every: Float[Array, "*batch vocab"], tokens: Int[Array, "*batch"]) -> Logprobs:
    of_token = jnp.take_along_axis(every, tokens[..., None], axis=-1)[..., 0]
    top, top_tokens = largest(every, min(TOP, every.shape[-1]))
    return Logprobs(of_token, top, top_tokens)
