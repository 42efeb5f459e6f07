"""Rows of labelled data, read from files or made, and texts made of their fields."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cramjax.config import DataConfig
from cramjax.data.records import Record, read_records
from cramjax.data.sources import find_sources
from cramjax.errors import DataError
from cramjax.evaluation.made import MADE
from cramjax.loading import did_you_mean

_MADE_PREFIX = "made:"
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def read_rows(source: str | Path, split: str = "test") -> Iterator[Record]:
    """The rows of a data set, in order, read as they are asked for.

    Args:
        source: anything that examples are read from (`cramjax.data.records`); or `made:NAME`, a data set that the
            project makes itself.
        split: of a data set that has several, which.

    Raises:
        DataError: it does not exist, is damaged or of another kind, or there is no such split.
    """
    if str(source).startswith(_MADE_PREFIX):
        yield from _made(str(source).removeprefix(_MADE_PREFIX))
        return
    yield from read_records(find_sources(str(source)), DataConfig(hub_split=split))


def fill(template: str, row: Record) -> str:
    """A text with `{field}` replaced by the row's field, `{{` and `}}` by braces.

    A dot goes on into what a field holds: `{choices.text}`, `{options.0}`. Numbers and true and false are written as in
    JSON.

    Raises:
        DataError: the row has no such field, or what it holds is no text.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        found = lookup(match[1], row)
        if isinstance(found, str):
            return found
        if isinstance(found, bool | int | float):
            return json.dumps(found)
        raise DataError(
            f"{row.where}: {{{match[1]}}} must be a text or a number, got {json.dumps(found, default=str)}."
        )

    return _FIELD.sub(value, template)


def fill_list(templates: str | tuple[str, ...], row: Record) -> list[str]:
    """Several texts: one of each template, or those of the list that a field holds, given as `{field}` alone.

    Raises:
        DataError: as of `fill`; or the list holds something else than texts and numbers.
    """
    if not isinstance(templates, str):
        return [fill(template, row) for template in templates]
    match = _FIELD.fullmatch(templates)
    if match is None or match[1] is None:
        return [fill(templates, row)]
    found = lookup(match[1], row)
    if not isinstance(found, list | tuple):
        return [fill(templates, row)]
    return [fill(f"{{{match[1]}.{number}}}", row) for number in range(len(found))]


def lookup(name: str, row: Record) -> Any:
    """What a field holds, or with dots a part of what it holds.

    Raises:
        DataError: there is no such field.
    """
    found: Any = row.values
    for part in [name] if name in row.values else name.split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list | tuple) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            raise DataError(f"{row.where}: there is no field {name!r}. Its fields: {', '.join(map(str, row.values))}.")
    return found


def _made(name: str) -> Iterator[Record]:
    if name not in MADE:
        raise DataError(
            f"there is no data set {_MADE_PREFIX}{name}{did_you_mean(name, list(MADE))} There are: "
            f"{', '.join(_MADE_PREFIX + known for known in MADE)}."
        )
    for number, fields in enumerate(MADE[name](), start=1):
        yield Record(fields, f"{_MADE_PREFIX}{name}, row {number}")
