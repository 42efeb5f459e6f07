"""From pieces of text to the tokens of an example, and which of them are to be predicted.

Only pieces that say so hold special tokens: in all others their names are text as any other, whoever wrote them.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from cramjax.data.tokenizer import Tokenizer


class Piece(NamedTuple):
    """A part of an example's text.

    Args:
        text: The text; of a special token, its name.
        predicted: Whether it is to be predicted.
        special: Whether it is a special token.
    """

    text: str
    predicted: bool
    special: bool = False


@dataclass(frozen=True)
class Example:
    """Tokens, and what is to be predicted of them.

    Args:
        ids: Token ids (tokens,).
        predicted: True where the token is to be predicted from those before it (tokens,).
        text_bytes: UTF-8 bytes of the text that the predicted tokens stand for; special tokens have none.
    """

    ids: NDArray[np.unsignedinteger]
    predicted: NDArray[np.bool_]
    text_bytes: int

    def __len__(self) -> int:
        """Tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class PieceEncoder:
    """Encodes examples as one text, so that words that cross the end of a piece are what they are to the tokenizer.

    Args:
        tokenizer: The model's.
    """

    tokenizer: Tokenizer

    @cached_property
    def special_names(self) -> tuple[str, ...]:
        """Names of the special tokens, longer ones first."""
        added = self.tokenizer.backend.get_added_tokens_decoder().values()
        return tuple(sorted((token.content for token in added if token.special), key=lambda name: (-len(name), name)))

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Matches the name of a special token; nothing where there are none."""
        return re.compile("|".join(map(re.escape, self.special_names)) or r"(?!)")

    def encode(self, pieces: Sequence[Piece], begin: Sequence[int] = (), end: Sequence[int] = ()) -> Example:
        """The example that pieces of text make.

        A token that begins in one piece and ends in another is predicted if the other is.

        Args:
            pieces: The text.
            begin: Tokens before it.
            end: Tokens after it, which are predicted.
        """
        ids, ends = self._tokens(pieces)
        wanted = np.repeat([piece.predicted for piece in pieces], [len(piece.text) for piece in pieces])
        predicted = wanted[np.maximum(ends, 1) - 1] if len(wanted) else np.zeros(0, bool)
        whole = np.concatenate([begin, ids, end]).astype(self.tokenizer.dtype)
        flags = np.concatenate([np.zeros(len(begin), bool), predicted, np.ones(len(end), bool)])
        flags[:1] = False  # There is nothing to predict the first token from.
        text = sum(len(piece.text.encode()) for piece in pieces if piece.predicted and not piece.special)
        return Example(whole, flags, text)

    def cut(self, example: Example, tokens: int) -> Example:
        """The beginning of an example."""
        ids, predicted = example.ids[:tokens], example.predicted[:tokens]
        return Example(ids, predicted, len(self.tokenizer.decode(ids[predicted].tolist()).encode()))

    def _tokens(self, pieces: Sequence[Piece]) -> tuple[list[int], NDArray[np.int64]]:
        """Token ids, and where in the text each ends, in characters."""
        groups = [
            ("".join(piece.text for piece in group), special)
            for special, group in groupby(pieces, key=lambda piece: piece.special)
        ]
        literal = any(not special and self.special.search(text) for text, special in groups)
        if not literal and any(special for _, special in groups):
            # As the library encodes it: what it does at the start of a text, and around special tokens, is its affair.
            groups, encoders = [("".join(text for text, _ in groups), True)], {True: self._marked}
        else:
            encoders = {True: self._marked, False: self._literal}
        ids, ends, start = [], [], 0
        for text, special in groups:
            encoding = encoders[special].encode(text, add_special_tokens=False)
            ids += encoding.ids
            ends += [start + end for _, end in encoding.offsets]
            start += len(text)
        return ids, np.asarray(ends, np.int64)

    @cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        """In which names of special tokens are these."""
        state = json.loads(self.tokenizer.plain_json())
        state["post_processor"] = None  # It would cut white space off the places of tokens.
        return tokenizers.Tokenizer.from_str(json.dumps(state))

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """In which they are text."""
        literal = tokenizers.Tokenizer.from_str(self._marked.to_str())
        literal.encode_special_tokens = True
        return literal
