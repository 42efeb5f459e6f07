"""What an answer is to be: `response_format`, `structured_outputs`, and limits of its tokens, as a constraint."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from cramjax.errors import ConfigError
from cramjax.serve.constraints import Both, GrammarKind, Grammars, TokenLimits
from cramjax.serve.http.fields import RequestError, several
from cramjax.serve.http.served import Served
from cramjax.serve.request import Constraint

MakeConstraint = Callable[[], Constraint]
"""A constraint for each choice, at its beginning."""


def constraint_of(values: Mapping[str, Any], served: Served, stop_tokens: frozenset[int]) -> MakeConstraint | None:
    """What a body asks of its answers; None: nothing.

    Args:
        values: of the body's fields.
        served: the model.
        stop_tokens: that end an answer, and may not among its first `min_tokens`.

    Raises:
        RequestError: it is no grammar, or there are several.
    """
    makers = [made for made in (_shape(values, served.grammars), _limits(values, served, stop_tokens)) if made]
    if len(makers) < 2:
        return makers[0] if makers else None
    return lambda: Both(makers[0](), makers[1]())


def grammar(grammars: Grammars, kind: GrammarKind, what: Any, name: str) -> MakeConstraint:
    """A grammar that a field gives.

    Raises:
        RequestError: it is none; the error names the field.
    """
    try:
        return grammars.maker(kind, what)
    except ConfigError as error:
        raise RequestError(f"{name}: {error}", name) from None


def _shape(values: Mapping[str, Any], grammars: Grammars) -> MakeConstraint | None:
    form: Mapping[str, Any] = values["response_format"] or {"type": "text"}
    wanted: Mapping[str, Any] = values["structured_outputs"] or {}
    kinds = [name for name in ("json", "regex", "choice", "grammar", "json_object") if wanted.get(name)]
    if len(kinds) > 1:
        raise RequestError(f"structured_outputs must be one of {', '.join(kinds)}, not several.", "structured_outputs")
    if wanted and not kinds:
        raise RequestError("structured_outputs must have json, regex, choice or grammar.", "structured_outputs")
    if kinds and form["type"] != "text":
        raise RequestError("structured_outputs and response_format exclude each other.", "structured_outputs")
    if form["type"] == "json_schema":
        schema = (form["json_schema"] or {}).get("schema")
        if schema is None:
            raise RequestError("response_format.json_schema must have a schema.", "response_format.json_schema")
        return grammar(grammars, "json", schema, "response_format.json_schema.schema")
    if form["type"] == "json_object" or kinds == ["json_object"]:
        return grammar(grammars, "json", {"type": "object"}, "response_format")
    if kinds:
        return grammar(grammars, kinds[0], wanted[kinds[0]], f"structured_outputs.{kinds[0]}")  # type: ignore[arg-type]
    return None


def _limits(values: Mapping[str, Any], served: Served, stop_tokens: frozenset[int]) -> MakeConstraint | None:
    allowed, first = values["allowed_token_ids"], values["min_tokens"]
    if allowed is not None and not allowed:
        raise RequestError("allowed_token_ids must have one token or more, or be left out.", "allowed_token_ids")
    encode = served.model.tokenizer.encode
    # In the middle of a text many tokenizers have another token for a word than at its beginning.
    never = {tuple(encode(before + word)) for word in several(values["bad_words"]) for before in ("", " ")}
    if allowed is None and not first and not never:
        return None
    runs = sorted(never - {()})
    limits = TokenLimits(served.vocab_size, allowed, stop_tokens, first, runs)
    return lambda: copy.copy(limits)  # nothing in it is changed in place
