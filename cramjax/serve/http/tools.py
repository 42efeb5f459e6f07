"""Tools: functions that the client has, and an answer may call, or must; what it then says is a grammar."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cramjax.serve.http.calls import CallForm
from cramjax.serve.http.conversation import no_tools
from cramjax.serve.http.fields import RequestError, is_text, short
from cramjax.serve.http.served import Served
from cramjax.serve.http.shaped import MakeConstraint, grammar


@dataclass(frozen=True)
class Tools:
    """What an answer may call."""

    told: list[Any]
    """The tools as the template is told of them."""
    form: CallForm
    """How calls are written."""
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
    if (form := served.calls) is None:
        raise no_tools("tools")
    if choice == "none":
        return None
    chosen, many = schemas, values["parallel_tool_calls"] and form.many
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        if name not in schemas:
            raise RequestError(f"tool_choice must be of tools, and there is no {short(name)}.", "tool_choice")
        chosen, many = {name: schemas[name]}, False
    forced = _forced(chosen, many, form, served) if choice not in (None, "auto") else None
    return Tools(given, form, frozenset(schemas), many, forced)


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
    if (schema or {}).get("type", "object") != "object":
        raise RequestError(
            f"{where}.function.parameters must be of type object, got {short(schema)}.", f"{where}.function.parameters"
        )
    return name, schema or {"type": "object", "properties": {}}


def _forced(schemas: Mapping[str, Any], many: bool, form: CallForm, served: Served) -> MakeConstraint:
    """One call or more, each in the form that `Calls` reads."""
    spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    rules = []
    for number, (name, schema) in enumerate(schemas.items()):
        head = json.dumps(f'{{"name": {json.dumps(name)}, "{form.arguments}": ')
        # A rule of its own, so that the schema is whole: its references are to places in itself.
        own = json.dumps({"type": "object", **schema, "x-guidance": spaces})
        rules += [f'call{number}: {head} arguments{number} "}}"', f"arguments{number}: %json {own}"]
    one = " | ".join(f"call{number}" for number in range(len(schemas)))
    begin, end = (_mark(text, served) for text in (form.begin, form.end))
    if form.listed:
        more = ' (", " call)*' if many else ""
        start = f'{begin} " "? "[" call{more} "]"'
    elif form.end:
        marked = f'{begin} "\\n" call "\\n" {end}'
        start = f'{marked} ("\\n" {marked})*' if many else marked
    else:
        start = "call"
    source = "\n".join([f"start: {start}", f"call: {one}", *rules, ""])
    return grammar(served.grammars, "grammar", source, "tools")


def _mark(text: str, served: Served) -> str:
    """A mark in a grammar: the token, where there is one of its name."""
    token = served.model.tokenizer.backend.token_to_id(text) if text else None
    return f"<[{token}]>" if token in served.model.tokenizer.special_ids else json.dumps(text)
