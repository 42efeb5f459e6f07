"""Tools: functions that the client has, and an answer may call, between the marks of `TOOL_CALL`."""

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cramjax.data import Tokenizer
from cramjax.data.examples.chat import TOOL_CALL
from cramjax.serve.http.conversation import no_tools
from cramjax.serve.http.fields import RequestError, is_text, short
from cramjax.serve.http.served import Served
from cramjax.serve.http.shaped import MakeConstraint, grammar

_BEGIN, _END = TOOL_CALL


@dataclass(frozen=True)
class Tools:
    """What an answer may call."""

    told: list[Any]
    """The tools as the template is told of them."""
    names: frozenset[str]
    many: bool
    """Whether several in one answer."""
    forced: MakeConstraint | None
    """Where it must call one: what it then says."""


def tools_of(values: Mapping[str, Any], served: Served) -> Tools | None:
    """The tools that a body gives; None: none, or none that may be called.

    Raises:
        RequestError: they are no tools, the one chosen is not among them, or the model has no words for any.
    """
    given, choice = values["tools"], values["tool_choice"]
    if given is None:
        if choice not in (None, "none"):
            raise RequestError("tool_choice needs tools.", "tool_choice")
        return None
    schemas: dict[str, Any] = {}
    for place, tool in enumerate(given):
        name, schema = _tool(tool, f"tools[{place}]")
        if name in schemas:
            raise RequestError(f"tools[{place}].function.name must be another than {short(name)}, which was given.",
                               f"tools[{place}].function.name")  # fmt: skip
        schemas[name] = schema
    if served.template is None or not served.template.takes_tools:
        raise no_tools("tools")
    if choice == "none":
        return None
    chosen, many = schemas, values["parallel_tool_calls"]
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        if name not in schemas:
            raise RequestError(f"tool_choice must be of tools, and there is no {short(name)}.", "tool_choice")
        chosen, many = {name: schemas[name]}, False
    forced = _forced(chosen, many, served) if choice not in (None, "auto") else None
    return Tools(given, frozenset(schemas), many, forced)


def _tool(tool: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Name and schema of a tool."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(function, dict):
        raise RequestError(f"{where} must be {{type: function, function: {{name, …}}}}, got {short(tool)}.", where)
    name, schema = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII):
        raise RequestError(
            f"{where}.function.name must be 1 to 64 letters, digits, _, . and -, got {short(name)}.",
            f"{where}.function.name",
        )
    if not is_text(function.get("description") or ""):
        raise RequestError(f"{where}.function.description must be a text.", f"{where}.function.description")
    if not isinstance(schema, dict | None):
        raise RequestError(
            f"{where}.function.parameters must be a JSON schema, got {short(schema)}.", f"{where}.function.parameters"
        )
    return name, schema or {"type": "object", "properties": {}}


def _forced(schemas: Mapping[str, Any], many: bool, served: Served) -> MakeConstraint:
    """One call or more, each in the form that `Calls` reads."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, schema in schemas.items()
    ]
    spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    schema = json.dumps({"x-guidance": spaces, "anyOf": calls})
    special = served.template.encoder.special_names if served.template else ()
    begin, end = (mark if mark in special else json.dumps(mark) for mark in TOOL_CALL)
    more = r' ("\n" call)*' if many else ""
    source = f'start: call{more}\ncall: {begin} "\\n" object "\\n" {end}\nobject: %json {schema}\n'
    return grammar(served.grammars, "grammar", source, "tools")


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    index: int
    name: str
    arguments: str
    """JSON."""

    def content(self) -> dict[str, Any]:
        """As answers have it, but for its index."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class Calls:
    """Reads calls in a text that comes in pieces: what may become one is held back, what is none stays text."""

    def __init__(self, tools: Tools):
        """Read calls of these tools."""
        self._tools, self._held = tools, ""
        self.count = 0

    def has_marks(self, tokenizer: Tokenizer) -> bool:
        """Whether the marks are special tokens, which texts are shown without."""
        return any(tokenizer.backend.token_to_id(mark) in tokenizer.special_ids for mark in TOOL_CALL)

    def add(self, text: str) -> tuple[str, tuple[Call, ...]]:
        """What is certain after more text: text that is of no call, and calls."""
        self._held += text
        said, calls = "", []
        while (begin := self._held.find(_BEGIN)) >= 0:
            end = self._held.find(_END, begin)
            before = self._held[:begin]
            said += before if before.strip() or not self.count else ""  # white space between calls is nobody's
            if end < 0:
                self._held = self._held[begin:]
                return said, tuple(calls)
            inside = self._held[begin + len(_BEGIN) : end]
            self._held = self._held[end + len(_END) :]
            if (call := self._call(inside)) is None:
                said += _BEGIN + inside + _END
            elif self.count == 0 or self._tools.many:
                calls.append(call)
                self.count += 1
        held = max(n for n in range(len(_BEGIN)) if self._held.endswith(_BEGIN[:n]))
        if self.count and not self._held[: len(self._held) - held].strip():
            return said, tuple(calls)
        said, self._held = said + self._held[: len(self._held) - held], self._held[len(self._held) - held :]
        return said, tuple(calls)

    def rest(self) -> str:
        """What was held back, after the last text."""
        rest, self._held = self._held, ""
        return rest if rest.strip() or not self.count else ""

    def _call(self, inside: str) -> Call | None:
        try:
            value = json.loads(inside)
        except (ValueError, RecursionError):
            return None
        name, arguments = (value.get("name"), value.get("arguments", {})) if isinstance(value, dict) else (None, None)
        if not isinstance(name, str) or name not in self._tools.names or not isinstance(arguments, dict):
            return None
        return Call(self.count, name, json.dumps(arguments, ensure_ascii=False))
