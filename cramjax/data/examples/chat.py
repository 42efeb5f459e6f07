"""Conversations: read from rows in their usual shapes, and rendered by a chat template.

What the assistant says is found by rendering beginnings of the conversation: up to its turn, and with it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import numpy as np
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from cramjax.data.examples.pieces import Piece, PieceEncoder
from cramjax.data.records import Record, as_text
from cramjax.data.tokenizer import Tokenizer
from cramjax.errors import DataError

PLAIN_TEMPLATE = r"""{{- bos_token }}
{%- for message in messages %}
    {{- message['role'] | capitalize + ':\n' + message['content'] }}
    {%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
    {{- '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif -%}
"""
"""The template of models that have none: each turn after its speaker's name, and the end of text after an answer."""

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""Names of speakers, in either shape, and what templates call them."""

Turn = Mapping[str, Any]
"""`{"role": "user", "content": "…"}`; in requests also `tool_calls`, as templates read them."""

_TODAY = date(2024, 7, 26)
"""Of templates that write the date: that which Llama's write where there is none. The day's own would make prepared
data and scores depend on when they were made."""

_MARK = "\ufdd0"
_FIRST_NAME = 0x100000
"""A special token's name in what somebody said is hidden from the template as the mark, which is no character of any
text, and a private character."""
_HERE = "\ufdd1"
"""No character of any text either: where a turn that is to be continued ends."""


def turns_of(record: Record, column: str | None) -> list[Turn]:
    """The conversation in a row.

    Args:
        record: The row.
        column: Where it is. Default: `messages`, or `conversations`.

    Raises:
        DataError: There is none, a turn has no known role or no text, or the assistant says nothing.
    """
    if column is None:
        column = "conversations" if "conversations" in record.values and "messages" not in record.values else "messages"
    turns = turns_in(record.value(column), column, record.where)
    if all(turn["role"] != "assistant" for turn in turns):
        raise DataError(f"{record.where}: no turn of the assistant, so nothing to predict. Leave the row out.")
    return turns


def turns_in(given: Any, column: str, where: str) -> list[Turn]:
    """The turns that a field holds.

    Args:
        given: What is in it.
        column: Its name.
        where: The row, for messages.

    Raises:
        DataError: It is no list of turns with known roles and texts.
    """
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise DataError(f"{where}: field {column!r} must be a list of turns, got {_short(given)}.")
    return [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(given, 1)]


def _turn(turn: Any, where: str) -> Turn:
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(turn, Mapping) and turn.get(role) is not None:
            name = turn[role]
            if not isinstance(name, str) or name not in ROLES:
                raise DataError(f"{where} has the role {_short(name)}. Roles are {', '.join(ROLES)}.")
            if turn.get(content) is None:
                raise DataError(f"{where} has no {content!r}. Give what is said, as a text.")
            return {"role": ROLES[name], "content": as_text(turn[content], f"{where}: {content!r}")}
    raise DataError(f"{where} must be {{role, content}} or {{from, value}}, got {_short(turn)}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def read_template(configured: str, own: str | None) -> str:
    """The text of a template, as `ExamplesConfig.template` names it; `own` is the model's.

    Raises:
        DataError: There is no such file, or it is no text.
    """
    if configured == "auto":
        return PLAIN_TEMPLATE if own is None else own
    if configured == "plain":
        return PLAIN_TEMPLATE
    try:
        return Path(configured).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"examples.template is {configured!r}, a file that cannot be read ({error}). Give auto, plain, or the path "
            "of a Jinja template."
        ) from error


def chat_template(source: str, encoder: PieceEncoder) -> "ChatTemplate":
    """A template in the environment that `transformers` gives to chat templates.

    Today (`strftime_now`) is always 26 July 2024, so that neither prepared data nor scores depend on the day.

    Args:
        source: The text of the template.
        encoder: Knows the special tokens.

    Raises:
        DataError: It is no Jinja template.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _TODAY.strftime}
    try:
        reads = meta.find_undeclared_variables(environment.parse(source))
        return ChatTemplate(environment.from_string(source), encoder, source, frozenset(reads))
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is no Jinja template (line {error.lineno}: {error}). Give another as examples.template."
        ) from error


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, compiled.

    Args:
        compiled: The template.
        encoder: Knows the special tokens.
        source: Its text.
        reads: Names of the values that it reads, such as `messages` and, where it tells of them, `tools`.
    """

    compiled: jinja2.Template
    encoder: PieceEncoder
    source: str
    reads: frozenset[str]

    def render(
        self, turns: Sequence[Turn], *, prompt: bool = False, values: Mapping[str, Any] = MappingProxyType({})
    ) -> str:
        """The text of a conversation; with `prompt`, that of it and the beginning of an answer.

        Args:
            turns: Of the conversation.
            prompt: Whether an answer begins after it.
            values: What else the template reads, such as `tools`.

        Raises:
            DataError: The template refuses it, or is wrong.
        """
        own = {"messages": list(turns), "add_generation_prompt": prompt, **special_texts(self.encoder.tokenizer)}
        try:
            return self.compiled.render({**values, **own})
        except Exception as error:  # The template is a program of somebody else's.
            raise DataError(f"the chat template cannot render it ({error or type(error).__name__})") from error

    def pieces(self, turns: Sequence[Turn], where: str) -> list[Piece]:
        """A conversation up to its last answer, with what the assistant says to be predicted.

        Predicted are its words and the tokens that end its turn, not the white space after these.

        Args:
            turns: From `turns_of`.
            where: The row, for messages.

        Raises:
            DataError: The template refuses it, does not keep what it wrote of the turns before, or ends an answer with
                no special token of this tokenizer.
        """
        hidden = self._hidden(turns)
        pieces, before = [], ""
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            try:
                asked = self.render(hidden[:number], prompt=True)
                answered = self.render(hidden[: number + 1])
            except DataError as error:
                raise DataError(f"{where}: {error}. Change the row, or examples.template.") from error.__cause__
            if not (asked.startswith(before) and answered.startswith(asked)):
                raise DataError(
                    f"{where}: the chat template writes the turns before turn {number + 1} otherwise once it is there, "
                    "so what the assistant says cannot be told apart. Give conversations of one answer, or another "
                    "examples.template (plain, or a file)."
                )
            answer = answered[len(asked) :]
            ended = max((match.end() for match in self.encoder.special.finditer(answer)), default=None)
            if ended is None:
                raise DataError(
                    f"{where}: the chat template ends an answer with {answer[-20:]!r}, in which there is no special "
                    f"token of this tokenizer ({', '.join(self.encoder.special_names[:8]) or 'it has none'}), so the "
                    "model could not end its turn. Set examples.template=plain, or give a template of this tokenizer's."
                )
            ended = ended if not answer[ended:].strip() else len(answer)
            pieces += self._cut(asked[len(before) :], False)
            pieces += self._cut(answer[:ended], True) + self._cut(answer[ended:], False)
            before = answered
        return pieces

    def question(
        self, turns: Sequence[Turn], values: Mapping[str, Any] = MappingProxyType({})
    ) -> NDArray[np.unsignedinteger]:
        """Token ids of a conversation and of the beginning of an answer, as examples have them before one.

        Args:
            turns: Of the conversation.
            values: What else the template reads, such as `tools`.

        Raises:
            DataError: The template refuses it, or is wrong.
        """
        return self.encoder.encode(self.asked(turns, values)).ids

    def told(
        self, turns: Sequence[Turn], values: Mapping[str, Any] = MappingProxyType({})
    ) -> NDArray[np.unsignedinteger]:
        """Token ids of a conversation, after which nobody's turn has begun; as of `question`."""
        text = self.render(self._hidden(turns), values=self._hide(values))
        return self.encoder.encode(self._cut(text, False)).ids

    def unfinished(
        self, turns: Sequence[Turn], values: Mapping[str, Any] = MappingProxyType({})
    ) -> NDArray[np.unsignedinteger]:
        """Token ids of a conversation up to the end of what its last turn says, which is to go on; as of `question`.

        Raises:
            DataError: as of `question`; or the template does not write what the last turn says.
        """
        *before, last = self._hidden(turns)
        text = self.render([*before, {**last, "content": last["content"] + _HERE}], values=self._hide(values))
        if (end := text.rfind(_HERE)) < 0:
            raise DataError("the chat template does not write what the last turn says, so it cannot go on")
        return self.encoder.encode(self._cut(text[:end], False)).ids

    def asked(self, turns: Sequence[Turn], values: Mapping[str, Any] = MappingProxyType({})) -> list[Piece]:
        """The same in pieces, to be encoded together with an answer; errors as of `question`."""
        return self._cut(self.render(self._hidden(turns), prompt=True, values=self._hide(values)), False)

    def _hidden(self, turns: Sequence[Turn]) -> list[Turn]:
        return [{**self._hide(turn), "role": turn["role"]} for turn in turns]

    def _hide(self, value: Any) -> Any:
        """A value without names of special tokens in the texts that are in it."""
        if isinstance(value, Mapping):
            return {self._hide(name): self._hide(own) for name, own in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(own) for own in value]
        if not isinstance(value, str):
            return value
        names = self.encoder.special_names
        return self.encoder.special.sub(lambda found: _MARK + chr(_FIRST_NAME + names.index(found[0])), value)

    def _cut(self, text: str, predicted: bool) -> list[Piece]:
        """What was rendered, in pieces: special tokens of the template, and text, in which hidden names are shown."""
        names, pieces, start = self.encoder.special_names, [], 0
        shown = re.compile(f"{_MARK}([{chr(_FIRST_NAME)}-{chr(_FIRST_NAME + max(len(names) - 1, 0))}])")

        def literal(text: str) -> Iterator[Piece]:
            if text:
                yield Piece(shown.sub(lambda found: names[ord(found[1]) - _FIRST_NAME], text), predicted)

        for found in self.encoder.special.finditer(text):
            pieces += [*literal(text[start : found.start()]), Piece(found[0], predicted, special=True)]
            start = found.end()
        return [*pieces, *literal(text[start:])]


def special_texts(tokenizer: Tokenizer) -> dict[str, str]:
    """Names of the tokens before and after a text, as templates call them."""
    begin = [tokenizer.separator_id] if tokenizer.begin_ids is None else tokenizer.begin_ids[:1]
    ids = {"eos_token": tokenizer.separator_id, **({"bos_token": begin[0]} if begin else {})}
    return {role: tokenizer.backend.id_to_token(index) or "" for role, index in ids.items()}


class _Generation(Extension):
    """`{% generation %}`, in which newer templates put what the assistant says: it renders what is in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
