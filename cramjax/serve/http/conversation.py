"""Messages of a chat as its template reads them, the tools told of with them, and the prompt that they make."""

import json
from collections.abc import Mapping
from typing import Any

from cramjax.data.examples.chat import ROLES, ChatTemplate, Turn
from cramjax.errors import DataError
from cramjax.serve.http.fields import RequestError, is_text, require_shallow, short
from cramjax.serve.http.served import Served

_ROLES = {**ROLES, "developer": "system", "tool": "tool"}


def conversation(values: Mapping[str, Any], served: Served, tools: list[Any] | None = None) -> tuple[int, ...]:
    """Token ids of `messages`, up to where the answer begins, or goes on.

    Args:
        values: of the body's fields.
        served: the model.
        tools: that its template is to tell of.

    Raises:
        RequestError: they are no messages, or the model has no chat template.
    """
    if served.template is None:
        raise RequestError(
            "this model has no chat template: use /v1/completions, or serve it with --chat_template=plain.", "messages"
        )
    goes_on, begins = values["continue_final_message"], values["add_generation_prompt"]
    if goes_on and begins:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other.", "continue_final_message"
        )
    turns = [_turn(message, f"messages[{place}]") for place, message in enumerate(values["messages"])]
    if served.calls is None:
        for place, turn in enumerate(turns):
            if turn["role"] == "tool" or "tool_calls" in turn:
                raise no_tools(f"messages[{place}]")
    if goes_on and (turns[-1]["role"] != "assistant" or "tool_calls" in turns[-1]):
        raise RequestError(
            f"messages[{len(turns) - 1}] must be a text of the assistant, for continue_final_message to go on with.",
            "continue_final_message",
        )
    more = _more(values, served.template, tools)
    written = served.template
    write = written.unfinished if goes_on else written.told if begins is False else written.question
    try:
        return tuple(write(turns, more).tolist())
    except DataError as error:
        raise RequestError(f"messages: {error}.", "messages") from None


def _more(values: Mapping[str, Any], template: ChatTemplate, tools: list[Any] | None) -> dict[str, Any]:
    """What the template reads beside the messages."""
    more = dict(values["chat_template_kwargs"] or {})
    for name in ("documents", "reasoning_effort"):
        if values[name]:
            if name not in template.reads:
                raise RequestError(
                    f"{name} is not served: this model's chat template does not read it.", name, code="unsupported"
                )
            more[name] = values[name]
    return more if tools is None else more | {"tools": tools}


def no_tools(name: str) -> RequestError:
    """The error of tools that a model has no words for."""
    why = "this model's chat template has no tools, or calls of a form that is not known here (see --tool_calls)"
    return RequestError(f"{name} is not served: {why}.", name, code="unsupported")


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object of role and content, got {short(message)}.", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(_ROLES)}, got {short(role)}.", f"{where}.role")
    calls = message.get("tool_calls") if role == "assistant" else None
    known = ("role", "content", "name", "refusal", *(("tool_call_id",) if role == "tool" else ()))
    others = [name for name, value in message.items() if name not in known and value and value is not calls]
    if others:
        raise RequestError(f"{where}: {short(others[0])} is not served.", where, code="unsupported")
    turn: dict[str, Any] = {"role": _ROLES[role], "content": _content(message, where, optional=bool(calls))}
    for name in ("name", "tool_call_id"):
        if is_text(message.get(name)):
            turn[name] = message[name]
    if calls:
        if not isinstance(calls, list):
            raise RequestError(f"{where}.tool_calls must be a list, got {short(calls)}.", f"{where}.tool_calls")
        turn["tool_calls"] = [_call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(calls)]
    return turn


def _content(message: Mapping[str, Any], where: str, optional: bool) -> str:
    content = message.get("content")
    if content is None and optional:
        return ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(is_text(text) for text in texts):
        raise RequestError(
            f"{where}.content must be a text or a list of {{type: text, text}}, got {short(content)}.",
            f"{where}.content",
        )
    return "".join(str(text) for text in texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call that was made, its arguments as a value, which is what templates write."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not is_text(function.get("name")):
        raise RequestError(f"{where} must be {{function: {{name, arguments}}}}, got {short(call)}.", where)
    arguments = function.get("arguments", "{}")
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RequestError(
            f"{where}.function.arguments must be the text of a JSON object, got {short(arguments)}.",
            f"{where}.function.arguments",
        )
    require_shallow(value, f"{where}.function.arguments")
    given = {"id": call["id"]} if is_text(call.get("id")) else {}
    return {**given, "type": "function", "function": {"name": function["name"], "arguments": value}}
