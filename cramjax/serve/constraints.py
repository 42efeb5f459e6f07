"""What the tokens of a request may be, one after the other: by a grammar, or by lists of tokens.

A constraint says before each token which ones are allowed, as a bit for each, and is told which one was drawn. Grammars
are llguidance's (Guidance AI: an Earley parser over derivatives of regular expressions, with the vocabulary as a trie),
an optional dependency.
"""

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cramjax.data import Tokenizer
from cramjax.errors import ConfigError
from cramjax.serve.request import Constraint

GrammarKind = Literal["json", "regex", "choice", "grammar"]
"""A JSON schema; a regular expression; texts, one of which it is; a grammar in the form of Lark."""

_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it on one line. Were white space free, a model that likes it might never end."""
_KNOWN = 64
"""Grammars that are kept compiled."""


def words_of(vocab_size: int) -> int:
    """Int32 words that hold a bit for each token."""
    return -(-vocab_size // 32)


class Grammars:
    """The grammars of one vocabulary."""

    def __init__(self, tokenizer: Tokenizer):
        """Of a vocabulary.

        Raises:
            ConfigError: llguidance is not installed.
        """
        if find_spec("llguidance") is None:
            raise ConfigError("structured output needs llguidance, not installed here: pip install 'cramjax[serve]'.")
        import llguidance

        self._library: Any = llguidance
        self._tokenizer = tokenizer
        self._matcher = functools.lru_cache(maxsize=_KNOWN)(self._compiled)

    @functools.cached_property
    def vocabulary(self) -> Any:
        """The vocabulary as llguidance has it: a second's work, where it is large."""
        wrapped = self._library.TokenizerWrapper(_Vocabulary(self._tokenizer))
        return self._library.LLTokenizer(wrapped, eos_token=list(self._tokenizer.ends))

    def constraint(self, kind: GrammarKind, what: Any) -> Constraint:
        """A new constraint, at its beginning: one of `maker`'s."""
        return self.maker(kind, what)()

    def maker(self, kind: GrammarKind, what: Any) -> Callable[[], Constraint]:
        """Makes constraints, each at its beginning, of a grammar that is compiled once.

        Args:
            kind: of grammar.
            what: for `json` a schema as JSON has it, or its text; for `choice` a sequence of texts; else a text.

        Raises:
            ConfigError: it is no such thing, or uses what llguidance has not.
        """
        matcher = self._matcher(self._source(kind, what))
        return lambda: _Grammar(matcher.deep_copy())

    def _source(self, kind: GrammarKind, what: Any) -> str:
        library = self._library.LLMatcher
        try:
            if kind == "json":
                return library.grammar_from_json_schema(what, overrides=_JSON)
            if kind == "regex":
                return library.grammar_from_regex(what)
            if kind == "choice":
                return library.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in what))
            return library.grammar_from_lark(what)
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{kind} cannot be read: {error}") from None

    def _compiled(self, source: str) -> Any:
        matcher = self._library.LLMatcher(self.vocabulary, source, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"the grammar cannot be used: {_error(matcher)}")
        return matcher


def _error(matcher: Any) -> str:
    return " ".join(str(matcher.get_error()).partition("<state>")[0].split())[:300]


def constraints_for(
    tokenizer: Tokenizer, number: int, json_schema: Mapping[str, Any] | str | None, regex: str | None
) -> list[Constraint | None]:
    """A constraint for each of some texts, at its beginning; None where nothing is asked for.

    Args:
        tokenizer: of the model.
        number: of texts.
        json_schema: what they are JSON of: a schema, or its text.
        regex: the regular expression that they are texts of.

    Raises:
        ConfigError: both are given; it is no schema or expression; llguidance is not installed.
    """
    if json_schema is not None and regex is not None:
        raise ConfigError("json_schema and regex exclude each other: give one.")
    if json_schema is None and regex is None:
        return [None] * number
    grammars = Grammars(tokenizer)
    if regex is not None:
        return [grammars.constraint("regex", regex) for _ in range(number)]
    return [grammars.constraint("json", json_schema) for _ in range(number)]


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of every token."""

    def __init__(self, tokenizer: Tokenizer):
        self.eos_token_id, self.bos_token_id = tokenizer.separator_id, None
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted({*tokenizer.special_ids, *tokenizer.ends})
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class _Grammar:
    """A text of a grammar, as far as it has come."""

    failure = ""

    def __init__(self, matcher: Any):
        self._matcher, self._allowed = matcher, np.zeros(0, np.int32)

    @property
    def is_over(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allow(self, words: NDArray[np.int32]) -> None:
        # Its mask has a word more than the vocabulary takes where that is a multiple of 32, and may have fewer than a
        # model whose vocabulary is padded.
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: len(words)]
        self._allowed = mask
        words[: len(mask)] &= mask
        words[len(mask) :] = 0

    def take(self, token: int) -> bool:
        if not _has(self._allowed, token):
            return False
        taken = self._matcher.consume_token(token)
        if self._matcher.is_error():  # its limits, which are of time and memory
            self.failure = _error(self._matcher)
        return taken


class TokenLimits:
    """Tokens that are allowed, tokens that are not yet, and runs of tokens that never are."""

    is_over, failure = False, ""

    def __init__(
        self,
        vocab_size: int,
        allowed: Collection[int] | None = None,
        late: Collection[int] = (),
        first: int = 0,
        never: Sequence[Sequence[int]] = (),
    ):
        """Begin.

        Args:
            vocab_size: of the model.
            allowed: the only tokens that may be drawn; None: all.
            late: tokens that may not be among the first ones.
            first: how many these are.
            never: runs of tokens, each of one or more, that may not be drawn one after the other.
        """
        self._allowed = _words(range(vocab_size) if allowed is None else allowed, vocab_size)
        self._late, self._first, self._never = ~_words(late, vocab_size), first, [tuple(run) for run in never]
        self._longest = max((len(run) for run in self._never), default=1)
        self._drawn, self._last = 0, ()

    def allow(self, words: NDArray[np.int32]) -> None:
        """See `Constraint`."""
        words &= self._allowed
        if self._drawn < self._first:
            words &= self._late
        for *before, last in self._never:
            if not before or self._last[-len(before) :] == tuple(before):
                words[last // 32] &= ~np.int32(_bit(last))

    def take(self, token: int) -> bool:
        """See `Constraint`."""
        words = self._allowed.copy()
        self.allow(words)
        if not _has(words, token):
            return False
        self._drawn += 1
        self._last = (*self._last, token)[-self._longest :]
        return True


class Both:
    """Two constraints at once."""

    def __init__(self, one: Constraint, other: Constraint):
        """What both allow."""
        self._parts = (one, other)

    @property
    def is_over(self) -> bool:
        """See `Constraint`."""
        return any(part.is_over for part in self._parts)

    @property
    def failure(self) -> str:
        """See `Constraint`."""
        return "; ".join(part.failure for part in self._parts if part.failure)

    def allow(self, words: NDArray[np.int32]) -> None:
        """See `Constraint`."""
        for part in self._parts:
            part.allow(words)

    def take(self, token: int) -> bool:
        """See `Constraint`."""
        return all([part.take(token) for part in self._parts])


def _has(words: NDArray[np.int32], token: int) -> bool:
    return token // 32 < len(words) and bool(int(words[token // 32]) >> token % 32 & 1)


def _bit(token: int) -> int:
    return (1 << token % 32) - (1 << 32 if token % 32 == 31 else 0)


def _words(tokens: Collection[int], vocab_size: int) -> NDArray[np.int32]:
    bits = np.zeros(32 * words_of(vocab_size), bool)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
