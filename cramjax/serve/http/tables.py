"""What bodies of each route may hold."""

import functools
import re
from dataclasses import replace
from typing import Any

from cramjax.serve.http import fields as f
from cramjax.serve.http.fields import Field, Table

MOST_LOGPROBS = 20
_MOST_CHOICES, _MOST_PROMPTS, _MOST_STOPS, _MOST_BIASES, _MOST_WORDS, _MOST_TOOLS = 128, 256, 16, 300, 128, 128
_MOST_DOCUMENTS = 128
_INT64 = 1 << 63
_OBJECT: dict[str, Any] = {"type": "object"}
_TEXT: dict[str, Any] = {"type": "string"}


@functools.cache
def completion_table(vocab_size: int) -> Table:
    """Of /v1/completions."""
    return Table(
        (
            _prompt(vocab_size),
            f.integer("max_tokens", "Most tokens of an answer; 0 with echo scores the prompt.", 0, _INT64, 16),
            f.boolean("echo", "Begin the answer with the prompt."),
            f.integer("logprobs", "Give log-probabilities, and those of so many likeliest.", 0, MOST_LOGPROBS),
            f.boolean("add_special_tokens", "Put before a text what the model has before texts.", True),
            f.integer("truncate_prompt_tokens", "Keep only so many tokens of a prompt; -1: as fit.", -1, _INT64),
            f.word("truncation_side", "Where tokens are left out. Default: left.", ("left", "right")),
            f.refused("suffix", "a model here continues a text, and fills no gap", [""]),
            f.refused("best_of", "ask for n choices with logprobs, and choose", [1]),
            *_both(vocab_size),
        )
    )


@functools.cache
def chat_table(vocab_size: int) -> Table:
    """Of /v1/chat/completions."""
    return Table(
        (
            *_messages(required=True),
            f.integer("max_completion_tokens", "Most tokens of an answer; as many as there is room for.", 1, _INT64),
            f.integer("max_tokens", "The same, by its old name.", 1, _INT64),
            f.boolean("logprobs", "Give log-probabilities."),
            f.integer("top_logprobs", "With logprobs: those of so many likeliest tokens too.", 0, MOST_LOGPROBS),
            _tool_choice(),
            f.boolean("parallel_tool_calls", "Whether an answer may call several tools.", True),
            f.refused("functions", "it is old: give tools"),
            f.refused("function_call", "it is old: give tool_choice", ["none"]),
            f.refused("chat_template", "templates come from whoever serves the model, as they are programs"),
            f.refused("echo", "of /v1/completions", [False]),
            f.refused("add_special_tokens", "the template says what stands before a conversation", [False]),
            f.refused("truncate_prompt_tokens", "leave messages out"),
            f.refused("audio", "this model answers in text"),
            f.refused("prediction", "serve with --engine.lookup, which guesses from the prompt"),
            f.refused("verbosity", "say it in a message"),
            f.refused("web_search_options", "this model looks nothing up"),
            f.refused("modalities", "this model answers in text", [["text"]]),
            *_both(vocab_size),
        )
    )


@functools.cache
def embedding_table(vocab_size: int) -> Table:
    """Of /v1/embeddings."""
    return Table(
        (
            replace(_prompt(vocab_size, 2048), name="input", about="What to embed."),
            f.text("model", "Name of the model; see /v1/models."),
            f.word(
                "encoding_format", "How vectors are written: numbers, or the bytes of float32.", ("float", "base64")
            ),
            f.integer("dimensions", "Numbers of a vector: as many as the model has.", 1, _INT64),
            f.integer("truncate_prompt_tokens", "-1 leaves out the end of texts that are too long.", -1, -1),
            *f.ignored("user"),
        )
    )


@functools.cache
def tokenize_table() -> Table:
    """Of /tokenize."""
    return Table(
        (
            f.text("prompt", "A text; or give messages."),
            *_messages(required=False),
            f.boolean("add_special_tokens", "Put before a text what the model has before texts.", True),
            f.boolean("return_token_strs", "Give the texts of the tokens too."),
            *f.ignored("model"),
        )
    )


@functools.cache
def detokenize_table(vocab_size: int) -> Table:
    """Of /detokenize."""
    tokens = f.integers("tokens", "Token ids.", 0, vocab_size - 1, 1_000_000, required=True)
    return Table((tokens, *f.ignored("model")))


def _both(vocab_size: int) -> tuple[Field, ...]:
    """What completions and chats share."""
    last = vocab_size - 1
    return (
        f.text("model", "Name of the model, or of an adapter; see /v1/models."),
        f.integer("n", "Answers to each prompt.", 1, _MOST_CHOICES, 1),
        f.boolean("stream", "Give the answer in pieces, as they come."),
        f.inner(
            "stream_options",
            "With stream.",
            f.boolean("include_usage", "End with a chunk that counts tokens."),
            f.boolean("continuous_usage_stats", "Count tokens in every chunk."),
            *f.ignored("include_obfuscation"),
        ),
        f.number("temperature", "Divides the logits; 0 takes the likeliest token.", 0.0, 100.0, 1.0),
        f.number("top_p", "Keep the likeliest tokens that reach this probability together.", 1e-6, 1.0, 1.0),
        f.integer("top_k", "Keep so many likeliest tokens; 0 or -1 keeps all.", -1, _INT64, 0),
        f.number("min_p", "Keep tokens of at least this share of the likeliest one's probability.", 0.0, 1.0, 0.0),
        f.number("repetition_penalty", "Makes tokens that are there less likely, above 1.", 0.01, 100.0, 1.0),
        f.number("presence_penalty", "Taken from the logits of tokens drawn before.", -2.0, 2.0, 0.0),
        f.number("frequency_penalty", "The same, for each time.", -2.0, 2.0, 0.0),
        _bias(vocab_size),
        f.integer("seed", "The same seed gives the same answer.", -_INT64, _INT64 - 1),
        f.texts("stop", "Texts that end an answer.", _MOST_STOPS),
        f.integers("stop_token_ids", "Tokens that end an answer.", 0, last, _MOST_STOPS),
        f.boolean("include_stop_str_in_output", "Show the text that ends it."),
        f.boolean("ignore_eos", "Go on where the model would end."),
        f.integer("min_tokens", "Tokens before which it does not end.", 0, _INT64, 0),
        f.integers("allowed_token_ids", "The only tokens that may be drawn.", 0, last, vocab_size),
        f.texts("bad_words", "Texts whose tokens are not drawn one after the other.", _MOST_WORDS),
        f.boolean("skip_special_tokens", "Leave the names of special tokens out.", True),
        f.integer("prompt_logprobs", "Give the prompt's log-probabilities too.", 0, MOST_LOGPROBS),
        f.boolean("return_token_ids", "Give token ids too."),
        f.boolean("return_tokens_as_token_ids", "In log-probabilities, write tokens as token_id:ID."),
        f.inner(
            "response_format",
            "What an answer is: a text, a JSON object, or JSON of a schema.",
            f.word("type", "Which.", ("text", "json_object", "json_schema"), required=True),
            f.inner(
                "json_schema",
                "Of json_schema.",
                f.anything("schema", "JSON Schema.", _OBJECT, "an object", lambda v: isinstance(v, dict)),
                *f.ignored("name", "description", "strict"),
            ),
        ),
        f.inner(
            "structured_outputs",
            "What an answer is; one of these.",
            f.anything("json", "JSON of a schema.", {"type": ["object", "string"]}, "a JSON schema", _is_schema),
            f.text("regex", "A text of a regular expression."),
            f.anything("choice", "One of some texts.", _list_of(_TEXT), "a list of texts, none empty", _are_texts),
            f.text("grammar", "A text of a grammar in the form of Lark."),
            f.boolean("json_object", "A JSON object."),
            *f.ignored("disable_any_whitespace", "disable_fallback"),
        ),
        f.text("cache_salt", "Only prompts with the same one share what was read of their beginnings."),
        *(
            f.refused(name, "it is old: give structured_outputs")
            for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        ),
        f.boolean("use_beam_search", "Look for the n likeliest answers, with n beams; nothing is drawn."),
        f.number("length_penalty", "Of that search: divides log-probabilities by length to this power.", -10, 10, 1.0),
        f.refused("priority", "who comes first is served first", [0]),
        f.refused("logits_processors", "they are programs"),
        f.refused("prompt_embeds", "prompts are texts or tokens"),
        f.refused("spaces_between_special_tokens", "texts are as the tokenizer writes them", [True]),
        f.refused("stream_interval", "tokens are sent as they come", [1]),
        *f.ignored("user", "metadata", "store", "service_tier", "request_id", "safety_identifier", "prompt_cache_key"),
    )


def _prompt(vocab_size: int, most: int = _MOST_PROMPTS) -> Field:
    token = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    one = [{"type": "string", "minLength": 1}, {"type": "array", "items": token, "minItems": 1}]
    schema = {"anyOf": [*one, {"type": "array", "items": {"anyOf": one}, "minItems": 1, "maxItems": most}]}

    def is_prompt(value: Any) -> bool:
        if isinstance(value, list):
            return bool(value) and f.is_tokens(value, 0, vocab_size - 1)
        return f.is_text(value) and bool(value)

    def right(value: Any) -> bool:
        some = isinstance(value, list) and 0 < len(value) <= most and all(is_prompt(each) for each in value)
        return some or is_prompt(value)

    allowed = f"a text or token ids (below {vocab_size}), or a list of at most {most} of these, none empty"
    return Field("prompt", schema, allowed, right, about="What to go on with.", required=True)


def _messages(required: bool) -> tuple[Field, ...]:
    """A conversation, and what its template is told; `cramjax.serve.http.conversation` reads it."""
    message = {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"anyOf": [_TEXT, _list_of(_OBJECT), {"type": "null"}]},
            "name": {"type": ["string", "null"]},
            "tool_calls": {"anyOf": [_list_of(_OBJECT), {"type": "null"}]},
            "tool_call_id": {"type": ["string", "null"]},
        },
        "required": ["role"],
    }
    tool = {
        "type": "object",
        "properties": {"type": {"const": "function"}, "function": _OBJECT},
        "required": ["type", "function"],
    }
    return (
        Field(
            "messages",
            _list_of(message),
            "a list of {role, content}, one or more",
            lambda v: isinstance(v, list) and bool(v),
            about="What was said so far.",
            required=required,
        ),
        f.anything(
            "tools",
            "Functions that an answer may call, where the model's template tells of them.",
            _list_of(tool) | {"maxItems": _MOST_TOOLS},
            f"a list of one to {_MOST_TOOLS} tools, or left out",
            lambda v: isinstance(v, list) and 0 < len(v) <= _MOST_TOOLS,
        ),
        f.anything(
            "chat_template_kwargs",
            "More values that the model's template reads.",
            _OBJECT,
            "an object whose names are identifiers, none of them the template's own",
            _are_names,
        ),
        f.anything(
            "documents",
            "Documents that the answer may draw on, where the model's template reads them.",
            _list_of({"type": "object", "additionalProperties": _TEXT}) | {"minItems": 0, "maxItems": _MOST_DOCUMENTS},
            f"a list of at most {_MOST_DOCUMENTS} objects whose values are texts",
            _are_documents,
        ),
        f.word("reasoning_effort", "Where the model's template reads it.", ("minimal", "low", "medium", "high")),
        replace(f.boolean("add_generation_prompt", "Begin the turn of who answers. Default: true."), default=None),
        f.boolean("continue_final_message", "Go on with the last message, which is the assistant's."),
    )


def _tool_choice() -> Field:
    function = {"type": "object", "properties": {"name": _TEXT}, "required": ["name"]}
    named = {"type": "object", "properties": {"type": {"const": "function"}, "function": function}}
    schema = {"anyOf": [{"enum": ["none", "auto", "required"]}, named | {"required": ["type", "function"]}]}

    def right(value: Any) -> bool:
        if isinstance(value, dict):
            own = value.get("function")
            return value.get("type") == "function" and isinstance(own, dict) and f.is_text(own.get("name"))
        return isinstance(value, str) and value in ("none", "auto", "required")

    allowed = "none, auto, required, or {type: function, function: {name}}"
    return f.anything("tool_choice", "Whether an answer calls a tool, and which.", schema, allowed, right)


def _bias(vocab_size: int) -> Field:
    schema = {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": _MOST_BIASES,
    }

    def right(value: Any) -> bool:
        return isinstance(value, dict) and len(value) <= _MOST_BIASES and all(map(is_one, value, value.values()))

    def is_one(name: str, bias: Any) -> bool:
        is_id = re.fullmatch("[0-9]{1,10}", name) is not None and int(name) < vocab_size
        return is_id and f.is_number(bias, -100, 100)

    allowed = f"an object of token ids (below {vocab_size}) and numbers from -100 to 100, at most {_MOST_BIASES}"
    return Field("logit_bias", schema, allowed, right, about="Added to the logits of tokens.")


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict) or f.is_text(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(f.is_text(text) and text for text in value)


def _are_documents(value: Any) -> bool:
    def is_one(given: Any) -> bool:
        return isinstance(given, dict) and all(map(f.is_text, [*given, *given.values()]))

    return isinstance(value, list) and len(value) <= _MOST_DOCUMENTS and all(map(is_one, value))


def _are_names(value: Any) -> bool:
    own = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
    return isinstance(value, dict) and all(name.isidentifier() and name not in own for name in value)


def _list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}
