"""From a row to a pair of examples: an answer that was preferred, and one that was not, to the same prompt."""

from collections.abc import Callable, Mapping

import numpy as np

from cramjax.data.examples.chat import ChatTemplate, Turn, turns_in
from cramjax.data.examples.pieces import Example, Piece, PieceEncoder
from cramjax.data.records import Record
from cramjax.errors import DataError
from cramjax.examples import FIELDS

Pair = tuple[Example, Example]


def preference_reader(
    fields: Mapping[str, str], encoder: PieceEncoder, template: Callable[[], ChatTemplate]
) -> Callable[[Record], Pair]:
    """What makes a pair of a row: texts, or conversations where the answers are lists of turns.

    Of conversations the prompt may be left out: the two then begin alike. What the assistant said before the last turn
    is as likely in both, and makes no difference.

    Args:
        fields: names of the fields where they are others than prompt, chosen and rejected.
        encoder: of the model.
        template: gives the chat template, where one is needed.
    """
    asked, *answers = (fields.get(name, name) for name in FIELDS["preference"])
    before_prompt, before_none = encoder.tokenizer.opening([0]), encoder.tokenizer.opening()
    end = [encoder.tokenizer.separator_id]

    def text(record: Record, column: str) -> Example:
        prompt, answer = record.text(asked), record.text(column)
        if not answer:
            raise DataError(f"{record.where}: field {column!r} is empty, so there is nothing to compare. Leave it out.")
        begin = before_prompt if prompt else before_none
        return encoder.encode([Piece(prompt, False), Piece(answer, True)], begin, end)

    def conversation(record: Record, column: str) -> Example:
        before: list[Turn] = turns_in(record.value(asked), asked, record.where) if asked in record.values else []
        turns = [*before, *turns_in(record.value(column), column, record.where)]
        if turns[-1]["role"] != "assistant":
            raise DataError(f"{record.where}: field {column!r} must end with a turn of the assistant. Leave it out.")
        return encoder.encode(template().pieces(turns, record.where))

    def read(record: Record) -> Pair:
        spoken = [not isinstance(record.value(column), str) for column in answers]
        make = conversation if all(spoken) else text
        chosen, rejected = (make(record, column) for column in answers)
        if np.array_equal(chosen.ids, rejected.ids):
            raise DataError(f"{record.where}: both answers are the same, so neither is preferred. Leave the row out.")
        return chosen, rejected

    return read
