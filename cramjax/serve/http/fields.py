"""Fields of requests, declared in tables: a body is read by its table, and the server's description is written from it.

Whatever is wrong in a body is an error that names the field. What is null is not given.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

MOST_DEPTH = 64
"""How deep lists and objects of a field may lie in each other."""


class RequestError(Exception):
    """What is wrong with a request, as its client is told."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        """Say what is wrong.

        Args:
            message: a sentence: what was got, what is allowed.
            param: the field.
            status: of HTTP.
            code: a word for programs.
        """
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict[str, Any]:
        """As OpenAI's interface has it."""
        kind = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error", 500: "server_error"}
        return error_body(str(self), kind.get(self.status, "invalid_request_error"), self.param, self.code)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a body.

    Raises:
        RequestError: it is no JSON, no object, or a field is nested too deep.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise RequestError(f"the body must be a JSON object, and is no JSON ({str(error)[:200]}).") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, got {short(value)}.")
    for name, own in value.items():
        require_shallow(own, name.encode("utf-8", "replace").decode())
    return value


def require_shallow(value: Any, name: str) -> None:
    """Refuse what is nested too deep for those that walk it, templates among them.

    Args:
        value: of JSON.
        name: of the field that holds it.

    Raises:
        RequestError: lists and objects lie in each other more than `MOST_DEPTH` deep.
    """
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [value for some in inner for value in some if isinstance(value, dict | list)]
        if not level:
            return
    raise RequestError(f"{name} must be nested at most {MOST_DEPTH} deep.", name)


def short(value: Any) -> str:
    """A value in a message."""
    text = json.dumps(value, default=str)  # ASCII, so that no half of a character is in it
    return text if len(text) <= 60 else f"{text[:60]}…"


@dataclass(frozen=True)
class Field:
    """A field that a body may have.

    Args:
        name: of the field.
        schema: what it may be, as JSON Schema.
        allowed: the same in words, for messages.
        right: whether a value is so.
        default: its value where it is not given.
        about: what it does.
        why: of a field that is refused: why.
        required: whether it must be given.
    """

    name: str
    schema: Mapping[str, Any]
    allowed: str
    right: Callable[[Any], bool]
    default: Any = None
    about: str = ""
    why: str | None = None
    required: bool = False
    inner: "Table | None" = None
    """Of an object: its own fields."""

    def read(self, values: Mapping[str, Any], where: str) -> Any:
        """Its value in a body.

        Args:
            values: the body's.
            where: what stands before its name in messages.

        Raises:
            RequestError: the value is none that is allowed.
        """
        value, name = values.get(self.name), f"{where}{self.name}"
        if value is None:
            if self.required:
                raise RequestError(f"{name} must be given: {self.allowed}.", name)
            return self.default
        if not self.right(value):
            if self.why is not None:
                raise RequestError(f"{name} is not served: {self.why}.", name, code="unsupported")
            raise RequestError(f"{name} must be {self.allowed}, got {short(value)}.", name)
        return value if self.inner is None else self.inner.read(value, f"{name}.")

    def described(self) -> dict[str, Any]:
        """Its schema with all that is known of it."""
        own = self.inner.schema() if self.inner else dict(self.schema)
        about = f"Not served: {self.why}." if self.why is not None else self.about
        return (
            own
            | ({"description": about} if about else {})
            | ({} if self.default is None else {"default": self.default})
        )


@dataclass(frozen=True)
class Table:
    """The fields that an object may have, and no others."""

    fields: tuple[Field, ...]

    def read(self, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """The value of every field.

        Args:
            values: an object.
            where: what stands before names in messages (`stream_options.`).

        Raises:
            RequestError: a value is wrong, or there is a field that nobody knows.
        """
        read = {field.name: field.read(values, where) for field in self.fields}
        for name in sorted(values.keys() - read.keys()):
            param = f"{where}{name}".encode("utf-8", "replace").decode("utf-8")
            raise RequestError(f"there is no field {short(param)} here: leave it out.", param)
        return read

    def schema(self) -> dict[str, Any]:
        """As JSON Schema; everything that is not required may be null."""
        properties = {}
        for field in self.fields:
            own = field.described()
            if not field.required:
                about = {name: own.pop(name) for name in ("description", "default") if name in own}
                own = {"anyOf": [own, {"type": "null"}], **about}
            properties[field.name] = own
        required = [field.name for field in self.fields if field.required]
        schema = {"type": "object", "properties": properties, "additionalProperties": False}
        return schema | ({"required": required} if required else {})


def boolean(name: str, about: str, default: bool = False) -> Field:
    """True or false."""
    return Field(name, {"type": "boolean"}, "true or false", lambda v: isinstance(v, bool), default, about)


def integer(name: str, about: str, low: int, high: int, default: int | None = None) -> Field:
    """A whole number of a range, ends included."""
    schema = {"type": "integer", "minimum": low, "maximum": high}
    return Field(name, schema, f"an integer from {low} to {high}", lambda v: is_integer(v, low, high), default, about)


def number(name: str, about: str, low: float, high: float, default: float) -> Field:
    """A finite number of a range, ends included."""
    schema = {"type": "number", "minimum": low, "maximum": high}
    return Field(name, schema, f"a number from {low:g} to {high:g}", lambda v: is_number(v, low, high), default, about)


def text(name: str, about: str, required: bool = False) -> Field:
    """A text."""
    return Field(name, {"type": "string"}, "a text", is_text, None, about, required=required)


def word(name: str, about: str, words: Sequence[str], required: bool = False) -> Field:
    """One of some words."""
    allowed = f"one of {', '.join(words)}"
    return Field(name, {"enum": list(words)}, allowed, lambda v: v in words, None, about, required=required)


def texts(name: str, about: str, most: int) -> Field:
    """A text or several, none of them empty; read by `several`."""
    one = {"type": "string", "minLength": 1}
    schema = {"anyOf": [one, {"type": "array", "items": one, "maxItems": most}]}

    def right(value: Any) -> bool:
        some = [value] if isinstance(value, str) else value
        return isinstance(some, list) and len(some) <= most and all(is_text(text) and text for text in some)

    allowed = f"a text, or a list of at most {most} of them, none empty"
    return Field(name, schema, allowed, right, about=about)


def integers(name: str, about: str, low: int, high: int, most: int, required: bool = False) -> Field:
    """A list of whole numbers of a range, ends included."""
    schema = {"type": "array", "items": {"type": "integer", "minimum": low, "maximum": high}, "maxItems": most}

    def right(value: Any) -> bool:
        return isinstance(value, list) and len(value) <= most and is_tokens(value, low, high)

    allowed = f"a list of at most {most} integers from {low} to {high}"
    return Field(name, schema, allowed, right, about=about, required=required)


def inner(name: str, about: str, *fields: Field) -> Field:
    """An object with fields of its own."""
    table = Table(fields)
    return Field(name, table.schema(), "an object", lambda v: isinstance(v, dict), about=about, inner=table)


def anything(name: str, about: str, schema: Mapping[str, Any], allowed: str, right: Callable[[Any], bool]) -> Field:
    """What has a rule of its own."""
    return Field(name, schema, allowed, right, about=about)


def ignored(*names: str) -> tuple[Field, ...]:
    """Fields that change nothing here, whatever they are."""
    return tuple(Field(name, {}, "", lambda v: True, about="Changes nothing here.") for name in names)


def refused(name: str, why: str, unless: Sequence[Any] = ()) -> Field:
    """A field of what is not served, unless its value asks for nothing."""

    def right(value: Any) -> bool:
        return any(value == other and type(value) is type(other) for other in unless)

    return Field(name, {"enum": list(unless)} if unless else {"type": "null"}, "left out", right, why=why)


def several(value: str | list[str] | None) -> tuple[str, ...]:
    """What a field of `texts` holds."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def is_integer(value: Any, low: int, high: int) -> bool:
    """Whether a value is a whole number in a range, ends included."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any, low: float, high: float) -> bool:
    """Whether a value is a finite number in a range, ends included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= high and (isinstance(value, int) or math.isfinite(value))


def is_text(value: Any) -> bool:
    """Whether a value is a text, with no half of a character in it (which JSON can spell, and UTF-8 cannot)."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def is_tokens(value: Sequence[Any], low: int, high: int) -> bool:
    """Whether all values are whole numbers in a range, ends included."""
    return all(is_integer(each, low, high) for each in value)
