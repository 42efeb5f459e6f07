"""The description of all routes, as OpenAPI has it: what bodies may hold comes from the tables they are read by."""

from importlib.metadata import version
from typing import Any

from cramjax.serve.http.fields import Table
from cramjax.serve.http.served import Served
from cramjax.serve.http.tables import (
    chat_table,
    completion_table,
    detokenize_table,
    embedding_table,
    tokenize_table,
)

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_JSON, _EVENTS, _PLAIN = "application/json", "text/event-stream", "text/plain"
_ERRORS = {
    "400": "Something in the request is wrong: `param` says what.",
    "401": "The key is missing or wrong.",
    "404": "There is no such model or route.",
    "408": "The body came too slowly.",
    "413": "The body is too long.",
    "503": "There is no room, or no time: try again after `Retry-After` seconds.",
}


def description(served: Served) -> Schema:
    """The description of a served model."""
    size = served.vocab_size
    routes = {
        "/v1/completions": _post("Continue a text.", completion_table(size), _completion(), streams=True),
        "/v1/chat/completions": _post("Answer in a chat.", chat_table(size), _chat(), streams=True),
        "/v1/embeddings": _post("Embed texts.", embedding_table(size), _embeddings()),
        "/tokenize": _post("Tokens of a text or a chat.", tokenize_table(), _tokens()),
        "/detokenize": _post("The text of tokens.", detokenize_table(size), _object(prompt=_TEXT)),
        "/v1/models": _get("All models: the served one and its adapters.", _object(data=_list(_model()))),
        "/v1/models/{name}": _get("One model.", _model()) | {"parameters": [_name()]},
        "/tokenizer_info": _get("Special tokens, and the chat template.", _object(eos_token=_nullable(_TEXT))),
        "/version": _get("CramJAX's version.", _object(version=_TEXT)),
        "/health": _get("Whether requests are answered; needs no key.", _object(status=_TEXT)),
        "/ping": _get("The same.", _object(status=_TEXT)),
        "/load": _get("Choices in progress and waiting.", _object(server_load=_COUNT)),
        "/metrics": _get("Counters for Prometheus.", None),
        "/openapi.json": _get("This description.", {"type": "object"}),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": f"CramJAX: {served.name}", "version": version("cramjax")},
        "paths": routes,
        "components": {
            "schemas": {"Error": _error()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _get(about: str, answer: Schema | None) -> Schema:
    content = {_PLAIN: {"schema": _TEXT}} if answer is None else {_JSON: {"schema": answer}}
    return {"get": {"summary": about, "responses": _responses(content)}}


def _post(about: str, table: Table, answer: Schema, streams: bool = False) -> Schema:
    content = {_JSON: {"schema": answer}} | ({_EVENTS: {"schema": _TEXT}} if streams else {})
    body = {"required": True, "content": {_JSON: {"schema": table.schema()}}}
    return {"post": {"summary": about, "requestBody": body, "responses": _responses(content)}}


def _responses(content: Schema) -> Schema:
    wrong = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    right = {"200": {"description": "The answer.", "content": content}}
    return right | {status: {"description": about, "content": wrong} for status, about in _ERRORS.items()}


def _answer(name: str, choice: Schema) -> Schema:
    cached = _object(cached_tokens=_COUNT)
    usage = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT, prompt_tokens_details=cached)
    common = {"index": _COUNT, "finish_reason": {"enum": ["stop", "length", "tool_calls", "abort"]}}
    each = _object(**common, **choice)
    each["properties"]["stop_reason"] = _TEXT | {"description": "Of an answer that is given up (abort): why."}
    answer = {"choices": _list(each), "usage": usage}
    return _object(id=_TEXT, object={"const": name}, created=_COUNT, model=_TEXT, **answer)


def _completion() -> Schema:
    numbers = {"type": ["number", "null"]}
    top = _nullable({"type": "object", "additionalProperties": {"type": "number"}})
    scores = _object(
        tokens=_list(_TEXT), token_logprobs=_list(numbers), top_logprobs=_list(top), text_offset=_list(_COUNT)
    )
    return _answer("text_completion", {"text": _TEXT, "logprobs": _nullable(scores)})


def _chat() -> Schema:
    function = _object(name=_TEXT, arguments=_TEXT)
    call = _object(id=_TEXT, type={"const": "function"}, function=function)
    message = _object(role={"const": "assistant"}, content=_nullable(_TEXT))
    message["properties"]["tool_calls"] = _list(call)
    scores = _nullable(_object(content=_list({"type": "object"})))
    return _answer("chat.completion", {"message": message, "logprobs": scores})


def _embeddings() -> Schema:
    vector = {"anyOf": [_list({"type": "number"}), _TEXT]}
    each = _object(object={"const": "embedding"}, index=_COUNT, embedding=vector)
    return _object(data=_list(each), model=_TEXT, usage=_object(prompt_tokens=_COUNT, total_tokens=_COUNT))


def _tokens() -> Schema:
    return _object(count=_COUNT, max_model_len=_COUNT, tokens=_list(_COUNT))


def _model() -> Schema:
    return _object(id=_TEXT, object={"const": "model"}, max_model_len=_COUNT, parent=_nullable(_TEXT))


def _name() -> Schema:
    return {"name": "name", "in": "path", "required": True, "schema": _TEXT}


def _error() -> Schema:
    return _object(error=_object(message=_TEXT, type=_TEXT, param=_nullable(_TEXT), code=_nullable(_TEXT)))


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}
