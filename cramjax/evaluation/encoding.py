"""Texts as requests for log-likelihoods: where a prompt ends in tokens, what begins a text, windows over a long one.

The rules are those of lm-evaluation-harness, so that scores can be compared with its.
"""

from collections.abc import Iterator, Sequence

from cramjax.data import Tokenizer
from cramjax.data.examples.pieces import Piece, PieceEncoder
from cramjax.evaluation.likelihood import Pair
from cramjax.language_model import LanguageModel


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Ids of a context and of what continues it; the continuation's may be none where tokens reach across both.

    Spaces at the context's end move to the continuation, for most vocabularies have them in the word that follows. Both
    are encoded as one text and split where the context alone ends. What stands before a text (`<s>`, or our
    separator) stands before the context; where that is empty, it is the context.

    Args:
        tokenizer: the model's.
        context: may be empty.
        continuation: what is scored. Names of special tokens in either are text.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    before = tokenizer.encode(kept)
    if not before:
        return tokenizer.opening(), tokenizer.encode(continuation)
    whole = tokenizer.encode(kept + continuation)
    return [*tokenizer.opening(before), *before], whole[len(before) :]


def encode_answer(encoder: PieceEncoder, question: Sequence[Piece], answer: str) -> Pair:
    """The same of an answer after a question that a chat template has put, some of whose pieces are special tokens.

    Args:
        encoder: of the model's tokenizer.
        question: from `ChatTemplate.asked`.
        answer: what is scored. Names of special tokens in it are text.
    """
    *first, last = question
    kept = last.text if last.special else last.text.rstrip()
    before = [*first, last._replace(text=kept)]
    ids = encoder.encode(before).ids.tolist()
    whole = encoder.encode([*before, Piece(last.text[len(kept) :] + answer, True)]).ids.tolist()
    return opened(encoder.tokenizer, ids), whole[len(ids) :]


def opened(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Ids of a text with what stands before it, which the text may have named itself."""
    opening = tokenizer.opening(ids)
    return ids if opening == ids[: len(opening)] else [*opening, *ids]


def is_cut(model: LanguageModel, pair: Pair) -> bool:
    """Whether a context and its continuation are longer than the model sees, so that the context loses its start."""
    return len(pair[0]) + len(pair[1]) > model.context + 1


def windows(ids: Sequence[int], begin: int, context: int) -> Iterator[Pair]:
    """A text as contexts and continuations, which together are every token once.

    The first window sees `begin`; each further one the token before it, and the last one so many more that it is as
    long as the context allows.

    Args:
        ids: of the text, at least one.
        begin: what the first token is predicted from.
        context: tokens that the model sees.

    Source: lm-evaluation-harness, `get_rolling_token_windows` with a context of one token.
    """
    row = [begin, *ids]
    for start in range(0, len(ids), context):
        stop = min(start + context, len(ids))
        yield row[max(0, stop - context) : start + 1], row[start + 1 : stop + 1]
