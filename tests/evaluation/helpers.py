"""What the tests of evaluation share beside fixtures."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cramjax.language_model import LanguageModel

MakeModel = Callable[..., LanguageModel]
WriteTask = Callable[..., Path]


def write_rows(file: Path, rows: Iterable[Any]) -> Path:
    """Rows as JSON lines; a text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file
