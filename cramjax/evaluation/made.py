"""Data sets that the project makes itself: sentences of a small grammar, sums, and texts of Python's standard library.

What is made is the same at every call. What is read of the standard library is Python's, and changes with its version.
"""

import ast
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from cramjax.errors import DataError

Rows = Iterator[dict[str, Any]]

# Singular and plural. Subjects can act; no verb needs an object.
_NOUNS = (
    *(("author", "authors"), ("teacher", "teachers"), ("farmer", "farmers"), ("pilot", "pilots")),
    *(("child", "children"), ("woman", "women"), ("surgeon", "surgeons"), ("neighbour", "neighbours")),
    *(("king", "kings"), ("dancer", "dancers")),
)
_VERBS = (
    *(("laughs", "laugh"), ("sleeps", "sleep"), ("is old", "are old"), ("has left", "have left"), ("works", "work")),
    *(("was late", "were late"), ("smiles", "smile"), ("waits", "wait")),
)
_BEFORE = ("near", "behind", "beside", "next to")
_LIKING = (("likes", "like"), ("knows", "know"), ("helps", "help"), ("hears", "hear"))

_MODULES = (
    *("argparse", "ast", "base64", "bdb", "bisect", "calendar", "cgitb", "cmd", "codecs", "collections/__init__"),
    *("configparser", "contextlib", "copy", "csv", "dataclasses", "difflib", "dis", "doctest", "email/utils", "enum"),
    *("fileinput", "fnmatch", "fractions", "ftplib", "functools", "getopt", "glob", "gzip", "heapq", "imaplib"),
    *("inspect", "ipaddress", "linecache", "locale", "mailbox", "mimetypes", "numbers", "optparse", "os", "pathlib"),
    *("pdb", "pickletools", "platform", "poplib", "posixpath", "pprint", "pydoc", "random", "sched", "shlex", "shutil"),
    *("smtplib", "socket", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading"),
    *("timeit", "tokenize", "trace", "traceback", "types", "typing", "urllib/parse", "uuid", "warnings", "weakref"),
    *("zipfile", "zipfile/__init__"),
)
_CHOICES = 4
_SENTENCES = 400
"""Of each of the constructions that can have many."""


def agreement() -> Rows:
    """Minimal pairs: a verb that agrees with its subject, and one that does not.

    Fields: `good`, `bad`, and `construction`: `simple` (The author laughs), `phrase` (The author near the kings laughs)
    or `clause` (The author that the kings like laughs). Between subject and verb of the last two stands a noun of the
    other number. As many subjects are singular as plural.
    """
    simple = [(f"The {noun[number]}", verb, number, "simple") for noun, verb, number in product(_NOUNS, _VERBS, (0, 1))]
    others = [(a, b, verb, number) for a, b, verb, number in product(_NOUNS, _NOUNS, _VERBS, (0, 1)) if a != b]
    phrase = [
        (f"The {a[number]} {_BEFORE[place % 4]} the {b[1 - number]}", verb, number, "phrase")
        for place, (a, b, verb, number) in enumerate(others)
    ]
    clause = [
        (f"The {a[number]} that the {b[1 - number]} {_LIKING[place % 4][1 - number]}", verb, number, "clause")
        for place, (a, b, verb, number) in enumerate(others)
    ]
    for start, verb, number, construction in [*simple, *_spread(phrase, _SENTENCES), *_spread(clause, _SENTENCES)]:
        yield {
            "good": f"{start} {verb[number]}.",
            "bad": f"{start} {verb[1 - number]}.",
            "construction": construction,
        }


def sums() -> Rows:
    """Sums of two numbers below 100: `a`, `b` and `sum`, in an order that mixes small and large ones."""
    for a, b in _spread(list(product(range(100), repeat=2)), 400):
        yield {"a": a, "b": b, "sum": a + b}


def summaries() -> Rows:
    """Functions of the standard library, and which of four summaries is theirs.

    Fields: `function` (its first line), `choices` (four first lines of documentation, of functions of this list) and
    `gold` (the place of its own, from 0). Models that were trained on the standard library have seen the answers.

    Raises:
        DataError: the standard library's sources are not there.
    """
    found = _functions()
    if len(found) < _CHOICES:
        raise DataError("this Python comes without the standard library's sources, of which this data set is made.")
    texts = list(found)
    for place, summary in enumerate(texts):
        gold = place % _CHOICES
        others = [texts[(place + step * len(texts) // _CHOICES) % len(texts)] for step in range(1, _CHOICES)]
        yield {"function": found[summary], "choices": [*others[:gold], summary, *others[gold:]], "gold": gold}


def reference() -> Rows:
    """The topics of Python's own help: `topic` and `text`, English prose on the language.

    Raises:
        DataError: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python comes without pydoc_data, of which this data set is made.") from None
    for topic in sorted(topics):
        yield {"topic": topic, "text": topics[topic]}


MADE: dict[str, Callable[[], Rows]] = {
    "agreement": agreement,
    "reference": reference,
    "summaries": summaries,
    "sums": sums,
}
"""The data sets, by name."""


@cache
def _functions() -> dict[str, str]:
    """First lines of documented public functions of the standard library by their summaries, none of which is twice."""
    found: dict[str, str] = {}
    root = Path(sysconfig.get_path("stdlib"))
    for file in (root / f"{name}.py" for name in _MODULES):
        for node in ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []:
            if (
                isinstance(node, ast.FunctionDef)
                and not node.name.startswith("_")
                and (text := ast.get_docstring(node))
            ):
                summary = text.splitlines()[0].strip()
                if 20 <= len(summary) <= 100 and summary.endswith(".") and f"{node.name}(" not in summary:
                    found.setdefault(summary, f"def {node.name}({ast.unparse(node.args)}):")
    return found


def _spread(rows: list[Any], count: int) -> list[Any]:
    """So many of a list's items, or all, each once, from all parts of it at every point."""
    step = next(step for step in range(int(len(rows) * 0.618), 2 * len(rows)) if _coprime(step, len(rows)))
    return [rows[place * step % len(rows)] for place in range(min(count, len(rows)))]


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1
