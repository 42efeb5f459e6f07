"""From tokens to text, one at a time: what is given away never changes again.

Held back are a character of which some bytes are missing, and what may become a stop string. So the pieces of a stream
joined are the text that would have been answered whole.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from cramjax.data import Tokenizer

_BEFORE = 8
"""Tokens of the prompt that are decoded with the first that are drawn, because of spaces between words."""
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Text of tokens that come one at a time."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), shown: Collection[int] = ()):
        """Begin after a prompt.

        Args:
            tokenizer: the model's.
            prompt: token ids before the text.
            shown: special tokens that are shown, by their names.
        """
        self._tokenizer, self._skipped = tokenizer, frozenset(tokenizer.special_ids) - frozenset(shown)
        prompt = [token for token in prompt if self._is_shown(token)]
        begin = max(len(prompt) - _BEFORE, 0)
        while begin and self._is_byte(prompt[begin]):
            begin -= 1  # such bytes are decoded together or not at all
        before = self._decode(prompt[begin:])
        # What the prompt leaves of a character is the prompt's.
        self._ids = [] if before.endswith(_UNKNOWN) else list(prompt[begin:])
        self._read = len(self._ids)

    def add(self, token: int) -> str:
        """The text that a token adds: nothing while a character is not whole."""
        if not self._is_shown(token):
            return ""  # what is on both sides of it is decoded together
        self._ids.append(token)
        return "" if self._is_byte(token) else self._new(whole=False)

    def rest(self) -> str:
        """What was held back, after the last token."""
        return self._new(whole=True)

    def _new(self, whole: bool) -> str:
        before, after = self._decode(self._ids[: self._read]), self._decode(self._ids)
        if not after.startswith(before):
            before, after = "", self._decode(self._ids[self._read :])
        text = after[len(before) :]
        if not text or (after.endswith(_UNKNOWN) and not whole):
            return ""
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, special=True)  # those that are skipped do not come here

    def _is_shown(self, token: int) -> bool:
        return token not in self._skipped

    def _is_byte(self, token: int) -> bool:
        """Whether a token is one byte of a character that has no token: what follows may change its text."""
        name = self._tokenizer.backend.id_to_token(token) or ""
        return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


@dataclass
class StopStrings:
    """Text up to the first stop string, which is the one that is complete first.

    Args:
        stops: texts, each of a character or more.
        keep: whether the stop string itself is part of the text.
    """

    stops: tuple[str, ...]
    keep: bool = False
    found: bool = field(default=False, init=False)
    """Whether one was there."""
    _held: str = field(default="", init=False)

    def add(self, text: str) -> str:
        """What can be given away after more text: never a part of what may become a stop string."""
        if not self.stops or self.found:
            return "" if self.found else text
        before, self._held = len(self._held), self._held + text
        ends = [
            (at + len(stop), at)
            for stop in self.stops
            if (at := self._held.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if ends:
            self.found, (end, begin) = True, min(ends)
            text, self._held = self._held[: end if self.keep else begin], ""
            return text
        longest = max(map(len, self.stops)) - 1
        starts = range(max(0, len(self._held) - longest), len(self._held))
        cut = next((at for at in starts if any(s.startswith(self._held[at:]) for s in self.stops)), len(self._held))
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def rest(self) -> str:
        """What was held back, after the last text."""
        text, self._held = self._held, ""
        return text


class TextStream:
    """The text of an answer, token by token, up to a stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        *,
        keep_stop: bool = False,
        shown: Collection[int] = (),
    ):
        """Begin after a prompt.

        Args:
            tokenizer: the model's.
            prompt: its token ids.
            stops: texts that end the answer.
            keep_stop: whether the one that does is part of it.
            shown: special tokens that are shown, by their names.
        """
        self._text = Detokenizer(tokenizer, prompt, shown)
        self._stops = StopStrings(tuple(stops), keep_stop)
        self.length = 0
        """Characters decoded so far, what is held back by a stop string included."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended it: later tokens are nobody's."""
        return self._stops.found

    def add(self, token: int) -> str:
        """What can be given away after one more token."""
        return self._through(self._text.add(token))

    def end(self) -> str:
        """What was held back, after the last token."""
        return self._through(self._text.rest()) + self._stops.rest()

    def _through(self, text: str) -> str:
        self.length += len(text)
        return self._stops.add(text)
