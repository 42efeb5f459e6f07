"""Bodies of requests, read strictly: whatever is wrong in one is an error that names the field."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


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
        RequestError: it is no JSON, or no object.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise RequestError(f"the body must be a JSON object, and is no JSON ({str(error)[:200]}).") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, got {short(value)}.")
    return value


def short(value: Any) -> str:
    """A value in a message."""
    text = json.dumps(value, default=str)  # ASCII, so that no half of a character is in it
    return text if len(text) <= 60 else f"{text[:60]}…"


class Fields:
    """The fields of an object, each read once with its type; what is null is not given."""

    def __init__(self, values: Mapping[str, Any], where: str = ""):
        """Read an object.

        Args:
            values: its fields.
            where: what stands before their names in messages (`stream_options.`).
        """
        self._where = where
        self._values = {name: value for name, value in values.items() if value is not None}
        self._left = set(values)

    def __contains__(self, name: str) -> bool:
        """Whether a field is given, and not null."""
        return name in self._values

    def wrong(self, name: str, allowed: str) -> RequestError:
        """The error of a field that is not what is allowed."""
        return RequestError(
            f"{self._where}{name} must be {allowed}, got {short(self._values.get(name))}.", f"{self._where}{name}"
        )

    def take(self, name: str) -> Any:
        """A field as it is; None: not given."""
        self._left.discard(name)
        return self._values.get(name)

    def ignore(self, *names: str) -> None:
        """Take fields for read that change nothing here."""
        self._left -= set(names)

    def refuse(self, name: str, unless: Sequence[Any], why: str) -> None:
        """Refuse a field of what is not served, unless its value asks for nothing.

        Raises:
            RequestError: it asks for something.
        """
        value = self.take(name)
        if value is not None and not any(value == other and type(value) is type(other) for other in unless):
            raise RequestError(f"{self._where}{name} is not served: {why}.", f"{self._where}{name}", code="unsupported")

    def finish(self) -> None:
        """Refuse the fields that nobody read.

        Raises:
            RequestError: there is one.
        """
        for name in sorted(self._left):
            param = f"{self._where}{name}".encode("utf-8", "replace").decode("utf-8")
            raise RequestError(f"there is no field {short(param)} here: leave it out.", param)

    def boolean(self, name: str, default: bool = False) -> bool:
        """True or false."""
        return self._typed(name, default, lambda value: isinstance(value, bool), "true or false")

    def integer(self, name: str, default: T, low: int, high: int) -> int | T:
        """A whole number."""

        def right(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

        return self._typed(name, default, right, f"an integer from {low} to {high}")

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number that is finite."""
        return float(
            self._typed(name, default, lambda v: is_number(v, low, high), f"a number from {low:g} to {high:g}")
        )

    def text(self, name: str, default: T) -> str | T:
        """A text."""
        return self._typed(name, default, is_text, "a text")

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A text or several, none of them empty."""
        value = self.take(name)
        texts = [value] if isinstance(value, str) else ([] if value is None else value)
        if not isinstance(texts, list) or not all(is_text(text) and text for text in texts) or len(texts) > most:
            raise self.wrong(name, f"a text, or a list of at most {most} of them, none empty")
        return tuple(texts)

    def integers(self, name: str, low: int, high: int, most: int) -> tuple[int, ...]:
        """A list of whole numbers."""
        value = self.take(name)
        value = [] if value is None else value
        if not isinstance(value, list) or not is_tokens(value, low, high) or len(value) > most:
            raise self.wrong(name, f"a list of at most {most} integers from {low} to {high}")
        return tuple(value)

    def inner(self, name: str) -> "Fields | None":
        """An object."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self._where}{name}.")

    def _typed(self, name: str, default: Any, right: Callable[[Any], bool], allowed: str) -> Any:
        value = self.take(name)
        if value is None:
            return default
        if not right(value):
            raise self.wrong(name, allowed)
        return value


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
    return all(isinstance(each, int) and not isinstance(each, bool) and low <= each <= high for each in value)
