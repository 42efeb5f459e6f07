"""Calls of tools in what a model says: the forms that models write them in, and how they are read as the text comes.

The forms are those of Hermes and Qwen, `<tool_call>{"name": …, "arguments": {…}}</tool_call>`; of Llama 3, an answer
that is `{"name": …, "parameters": {…}}`; and of Mistral, `[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`.
"""

import json
import re
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from cramjax.data.examples import ChatTemplate

_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""How a call begins in all forms; those that begin otherwise are read when they are whole."""


@dataclass(frozen=True)
class CallForm:
    """How a model writes calls."""

    begin: str
    """What stands before a call."""
    end: str = ""
    """What stands after it."""
    arguments: str = "arguments"
    """What they are called in its object."""
    bare: bool = False
    """Whether an answer that begins with an object is a call too."""
    listed: bool = False
    """Whether calls stand in a list, after one `begin`."""
    many: bool = True
    """Whether an answer may hold several."""
    id_length: int | None = None
    """Letters of a call's id, where templates want so many."""

    def new_id(self) -> str:
        """An id for a call."""
        made = uuid.uuid4().hex
        return f"call_{made[:24]}" if self.id_length is None else made[: self.id_length]


FORMS = {
    "hermes": CallForm("<tool_call>", "</tool_call>"),
    "llama3": CallForm("<|python_tag|>", arguments="parameters", bare=True, many=False),
    "mistral": CallForm("[TOOL_CALLS]", listed=True, id_length=9),
}


def form_of(template: ChatTemplate | None) -> CallForm | None:
    """The form that a template teaches; None: it tells of no tools, or of calls in a form that is not known here."""
    if template is None or "tools" not in template.reads:
        return None
    source = template.source
    if "<tool_call>" in source and "<function=" not in source:
        return FORMS["hermes"]
    if "[TOOL_CALLS]" in source and "[ARGS]" not in source:
        return FORMS["mistral"]
    if re.search(r'\{"name": .*"parameters": ', source):
        return FORMS["llama3"]
    return None


@dataclass(frozen=True)
class Call:
    """What is new of a call: first its name, then pieces of its arguments."""

    index: int
    arguments: str = ""
    """JSON, as far as it goes."""
    name: str | None = None
    id: str = ""

    def content(self) -> dict[str, Any]:
        """As answers have it, but for its index."""
        if self.name is None:
            return {"function": {"arguments": self.arguments}}
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def joined(calls: Iterable[Call]) -> list[Call]:
    """Calls of which pieces follow each other, with these put together."""
    pieces: dict[int, list[Call]] = {}
    for call in calls:
        pieces.setdefault(call.index, []).append(call)
    return [replace(own[0], arguments="".join(each.arguments for each in own)) for own in pieces.values()]


class _Object:
    """Finds where an object of JSON ends, in a text that grows: each character is looked at once."""

    _SIGN = re.compile(r'["\\{}\[\]<]')

    def __init__(self) -> None:
        self.at, self._depth, self._quoted = 0, 0, False

    def end(self, text: str, depth: int = 0) -> int | None:
        """Where the bracket after which so many are open still ends; None: not in this text.

        No JSON has a `<` outside its strings, so that one ends it in any case: a mark, after an object that is broken.
        """
        while found := self._SIGN.search(text, self.at):
            sign, self.at = found[0], found.end()
            if self._quoted:
                self._quoted = sign != '"'
                self.at += sign == "\\"
            elif sign == '"':
                self._quoted = True
            elif sign == "<":
                self.at -= 1
                return self.at
            else:
                self._depth += 1 if sign in "{[" else -1
                if self._depth <= depth and sign in "}]":
                    return self.at
        self.at = max(self.at, len(text))
        return None

    def drop(self, characters: int) -> None:
        """Those at the beginning of the text are there no longer."""
        self.at -= characters


class Calls:
    """Reads calls in a text that comes in pieces: what may become one is held back, what is none stays text."""

    def __init__(self, form: CallForm, names: Collection[str], many: bool):
        """Read calls of tools of these names; of several calls, only the first one unless there may be `many`."""
        self._form, self._names, self._many = form, names, many
        self._held = self._before = ""
        self._object, self._muted = _Object(), False
        self._said, self._found = "", list[Call]()
        self._state = self._start if form.bare else self._outside
        self.count = 0
        """Calls so far."""

    def add(self, text: str) -> tuple[str, tuple[Call, ...]]:
        """What is certain after more text: text that is of no call, and pieces of calls."""
        self._held += text
        self._said, self._found = "", []
        while self._state():
            pass
        return self._said, tuple(self._found)

    def rest(self) -> str:
        """What was held back, after the last text."""
        held, self._held = self._held, ""
        if self._state == self._opened:
            return self._before + held
        is_text = self._state in (self._start, self._outside)
        return held if is_text and (held.strip() or not self.count) else ""

    # States: each does what can be done with what is held, and says whether more can.

    def _start(self) -> bool:
        begun = self._held.lstrip()
        if begun.startswith("{"):
            return self._open("")
        if begun:
            self._state = self._outside
        return bool(begun)

    def _outside(self) -> bool:
        begin, mark = self._held.find(self._form.begin), self._form.begin
        if begin >= 0:
            self._say(self._held[:begin])
            self._held = self._held[begin + len(mark) :]
            return self._open(mark)
        kept = max(n for n in range(len(mark)) if self._held.endswith(mark[:n]))
        said = self._held[: len(self._held) - kept]
        if said.strip() or not self.count:  # else it may be white space between calls
            self._say(said)
            self._held = self._held[len(said) :]
        return False

    def _opened(self) -> bool:
        """After a mark, or between two calls of a list: is it a call?"""
        inside = self._held.lstrip()
        if self._form.listed and self._before == self._form.begin and inside.startswith("["):
            self._before += self._held[: len(self._held) - len(inside) + 1]
            self._held = inside[1:]
            return True
        if not inside:
            return False
        if inside[0] != "{" or (self._form.listed and self._before == self._form.begin):
            return self._no_call()
        self._before, self._held = self._before + self._held[: len(self._held) - len(inside)], inside
        if (head := _HEAD.match(inside)) and head[1] in self._names:
            self._call(head[1])
            self._held, self._object = inside[head.end() :], _Object()
            self._state = self._arguments
            return True
        if (end := self._object.end(inside)) is None:
            return False
        if (whole := _whole(inside[:end])) is None or whole[0] not in self._names:
            return self._no_call()
        self._call(*whole)
        self._held, self._state = inside[end:], self._closing
        return True

    def _arguments(self) -> bool:
        end = self._object.end(self._held)
        piece = self._held if end is None else self._held[:end]
        if piece and not self._muted:
            self._found.append(Call(self.count - 1, piece))
        self._held = self._held[len(piece) :]
        self._object.drop(len(piece))
        if end is None:
            return False
        self._object, self._state = _Object(), self._tail
        self._held = "{" + self._held  # what is left of the object around them
        return True

    def _tail(self) -> bool:
        if (end := self._object.end(self._held)) is None:
            return False
        self._held, self._state = self._held[end:], self._closing
        return True

    def _closing(self) -> bool:
        """After an object that was a call."""
        rest, end = self._held.lstrip(), self._form.end
        if end and rest != end and end.startswith(rest):
            return False
        if not end and not rest:
            return False
        if not end and rest[0] == ("," if self._form.listed else ";"):
            self._held = rest[1:]
            return self._open(rest[0])
        if end and rest.startswith(end):
            self._held = rest[len(end) :]
        elif self._form.listed and rest[0] == "]":
            self._held = rest[1:]
        self._state = self._outside
        return True

    def _open(self, before: str) -> bool:
        self._before, self._object, self._state = before, _Object(), self._opened
        return True

    def _no_call(self) -> bool:
        self._say(self._before)
        self._state = self._outside
        return True

    def _say(self, text: str) -> None:
        self._said += text if text.strip() or not self.count else ""

    def _call(self, name: str, arguments: str = "") -> None:
        self._muted = bool(self.count) and not self._many
        if not self._muted:
            self._found.append(Call(self.count, arguments, name, self._form.new_id()))
            self.count += 1


def _whole(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is whole; None: it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name = value.get("name") if isinstance(value, dict) else None
    arguments = next((value[key] for key in ("arguments", "parameters") if key in value), {}) if name else None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)
