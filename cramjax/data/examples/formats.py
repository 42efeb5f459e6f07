"""From a row to the examples that it makes: one function for each format."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import get_args

from cramjax.data.examples.chat import chat_template, read_template, turns_of
from cramjax.data.examples.pieces import Example, Piece, PieceEncoder
from cramjax.data.examples.preference import preference_reader
from cramjax.data.records import Record
from cramjax.data.tokenizer import Tokenizer
from cramjax.errors import ConfigError, DataError
from cramjax.examples import FIELDS, ExamplesConfig, Format

ReadOne = Callable[[Record], Example]
Reader = Callable[[Record], tuple[Example, ...]]
"""Makes the examples that stay together: one, or a pair of answers."""


def reader_of(config: ExamplesConfig, tokenizer: Tokenizer, template: str | None) -> Reader:
    """What makes examples of a row.

    Args:
        config: Says what is in a row.
        tokenizer: The model's.
        template: Its chat template; None if it has none.

    Raises:
        ConfigError: `config.fields` names what the format does not have.
        DataError: The template cannot be read.
    """
    check_fields(config.fields, config.format)
    encoder = PieceEncoder(tokenizer)

    if config.format == "preference":
        made = cache(lambda: chat_template(read_template(config.template, template), encoder))
        read_pair = preference_reader(config.fields, encoder, made)
        return lambda record: read_pair(_of_format(config, record))
    match config.format:
        case "chat":
            read = _chat(config, encoder, template)
        case "completion":
            read = _completion(config, encoder)
        case "text":
            read = _text(config, encoder)
    return lambda record: (read(_of_format(config, record)),)


def _of_format(config: ExamplesConfig, record: Record) -> Record:
    """A row, unless it is one of another format.

    Raises:
        DataError: It has the fields of another format, and not those of this one.
    """
    named = [(format, FIELDS[format]) for format in get_args(Format)] + [("chat", ("conversations",))]
    there = [format for format, names in named if all(name in record.values for name in names)]
    wanted = [config.fields.get(name, name) for name in FIELDS[config.format]]
    if there and config.format not in there and not any(name in record.values for name in wanted):
        raise DataError(
            f"{record.where}: its fields ({', '.join(map(str, record.values))}) are those of "
            f"examples.format={there[0]}, and examples.format is {config.format}. Set that, or name what is meant in "
            "examples.fields."
        )
    return record


def check_fields(fields: Mapping[str, str], format: str) -> None:
    """Refuse names of fields for what a format does not read.

    Raises:
        ConfigError: There is one.
    """
    for name in fields:
        if name not in FIELDS[format]:
            known = ", ".join(FIELDS[format])
            group = "labels" if format == "labels" else "examples"
            raise ConfigError(f"{group}.fields names {name!r}, and {format} examples have {known}. Name one of these.")


def _chat(config: ExamplesConfig, encoder: PieceEncoder, own: str | None) -> ReadOne:
    template = chat_template(read_template(config.template, own), encoder)
    column = config.fields.get("messages")

    def read(record: Record) -> Example:
        return encoder.encode(template.pieces(turns_of(record, column), record.where))

    return read


def _completion(config: ExamplesConfig, encoder: PieceEncoder) -> ReadOne:
    tokenizer = encoder.tokenizer
    asked, wanted = (config.fields.get(name, name) for name in FIELDS["completion"])
    before_prompt, before_none = tokenizer.opening([0]), tokenizer.opening()

    def read(record: Record) -> Example:
        prompt, completion = record.text(asked), record.text(wanted)
        if not completion:
            raise DataError(f"{record.where}: field {wanted!r} is empty, so there is nothing to predict. Leave it out.")
        begin = before_prompt if prompt else before_none
        return encoder.encode([Piece(prompt, False), Piece(completion, True)], begin, [tokenizer.separator_id])

    return read


def _text(config: ExamplesConfig, encoder: PieceEncoder) -> ReadOne:
    tokenizer = encoder.tokenizer
    column = config.fields.get("text", "text")

    def read(record: Record) -> Example:
        text = record.text(column)
        if not text.strip():
            raise DataError(f"{record.where}: field {column!r} is empty, so there is nothing to predict. Leave it out.")
        return encoder.encode([Piece(text, True)], tokenizer.opening(), [tokenizer.separator_id])

    return read
