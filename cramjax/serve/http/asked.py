"""What a body of /v1/completions or /v1/chat/completions asks for, checked field by field."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cramjax.data.examples.chat import ROLES, ChatTemplate, Turn
from cramjax.errors import ConfigError, DataError
from cramjax.language_model import LanguageModel
from cramjax.serve.http.fields import Fields, RequestError, is_number, is_text, is_tokens, short
from cramjax.serve.request import Request, SamplingParameters

MOST_LOGPROBS = 20
_MOST_CHOICES, _MOST_PROMPTS, _MOST_STOPS, _MOST_BIASES = 128, 256, 16, 300
_INT64 = 1 << 63
_STRUCTURED = "no structured output yet; ask for it in the prompt"


@dataclass(frozen=True)
class Served:
    """The model as requests see it."""

    model: LanguageModel
    name: str
    template: ChatTemplate | None
    context: int
    vocab_size: int


@dataclass(frozen=True)
class Prompt:
    """A prompt, and how it is shown where it is echoed."""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Asked:
    """What is asked for. There are `n` choices for each prompt."""

    prompts: tuple[Prompt, ...]
    chat: bool
    n: int
    max_tokens: int | None
    """None: as many as the context has room for."""
    sampling: SamplingParameters
    stops: tuple[str, ...]
    stop_tokens: frozenset[int]
    keep_stop: bool
    special: bool
    """Whether special tokens are shown."""
    echo: bool
    logprobs: int | None
    """Likeliest tokens shown beside each; None: no log-probabilities."""
    prompt_logprobs: int | None
    token_ids: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool

    def requests(self, context: int) -> list[Request]:
        """One for each choice, in the order of their indices."""
        return [self._request(prompt, number, context) for prompt in self.prompts for number in range(self.n)]

    def _request(self, prompt: Prompt, number: int, context: int) -> Request:
        room = context - len(prompt.ids)
        most = room if self.max_tokens is None else self.max_tokens
        if most > room or room < 1 - self.echo:
            asked = "" if self.max_tokens is None else f" and {most} of max_tokens"
            raise RequestError(
                f"this model sees {context} tokens, got {len(prompt.ids)} of the prompt{asked}: shorten one.",
                "messages" if self.chat else "prompt",
                code="context_length_exceeded",
            )
        scores = self.echo and (self.logprobs is not None or most == 0)
        top = [count for count in (self.logprobs, self.prompt_logprobs) if count is not None]
        return Request(
            prompt=prompt.ids,
            max_tokens=most,
            sampling=replace(self.sampling, seed=_seed(self.sampling.seed, number)),
            stop_tokens=self.stop_tokens,
            top_logprobs=max(top) if top else None,
            prompt_logprobs=scores or self.prompt_logprobs is not None,
        )


def completion(body: Mapping[str, Any], served: Served) -> Asked:
    """What a body of /v1/completions asks for.

    Raises:
        RequestError: a field is wrong.
    """
    fields = Fields(body)
    _require_model(fields, served)
    fields.refuse("suffix", [""], "a model here continues a text, and fills no gap")
    fields.refuse("best_of", [1], "ask for n choices with logprobs, and choose")
    logprobs = fields.integer("logprobs", None, 0, MOST_LOGPROBS)
    echo = fields.boolean("echo")
    most = fields.integer("max_tokens", 16, 0, _INT64)
    if most == 0 and not echo:
        raise RequestError("max_tokens must be 1 or more, or 0 with echo, got 0.", "max_tokens")
    prompts = _prompts(fields, served)
    return _asked(fields, served, prompts, chat=False, max_tokens=most, logprobs=logprobs, echo=echo)


def chat(body: Mapping[str, Any], served: Served) -> Asked:
    """What a body of /v1/chat/completions asks for.

    Raises:
        RequestError: a field is wrong, or the model has no chat template.
    """
    fields = Fields(body)
    _require_model(fields, served)
    top = fields.integer("top_logprobs", None, 0, MOST_LOGPROBS)
    wants = fields.boolean("logprobs")
    if top is not None and not wants:
        raise RequestError("top_logprobs needs logprobs to be true.", "top_logprobs")
    if fields.boolean("continue_final_message") and fields.boolean("add_generation_prompt", True):
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other.", "continue_final_message"
        )
    fields.refuse("continue_final_message", [False], "use /v1/completions to go on with a text")
    fields.refuse("add_generation_prompt", [True], "the model answers, so its turn begins")
    _refuse_tools(fields)
    fields.refuse("chat_template", [], "templates come from whoever serves the model, as they are programs")
    fields.refuse("chat_template_kwargs", [{}], "this server's template takes nothing but messages")
    fields.refuse("documents", [[]], "put them into a message")
    fields.refuse("reasoning_effort", ["none"], "the model's own way of answering is not changed")
    fields.refuse("modalities", [["text"]], "this model answers in text")
    most = fields.integer("max_tokens", None, 1, _INT64)
    most = fields.integer("max_completion_tokens", most, 1, _INT64)
    ids = conversation(fields, served)
    logprobs = (top or 0) if wants else None
    return _asked(fields, served, (Prompt(ids, ""),), chat=True, max_tokens=most, logprobs=logprobs, echo=False)


def _asked(
    fields: Fields,
    served: Served,
    prompts: tuple[Prompt, ...],
    *,
    chat: bool,
    max_tokens: int | None,
    logprobs: int | None,
    echo: bool,
) -> Asked:
    """With the fields that both have."""
    stream = fields.boolean("stream")
    options = fields.inner("stream_options")
    if options is not None and not stream:
        raise RequestError("stream_options needs stream to be true.", "stream_options")
    usage = options.boolean("include_usage") if options else False
    continuous = options.boolean("continuous_usage_stats") if options else False
    if options:
        options.ignore("include_obfuscation")
        options.finish()
    prompt_logprobs = fields.integer("prompt_logprobs", None, 0, MOST_LOGPROBS)
    if prompt_logprobs is not None and stream:
        raise RequestError("prompt_logprobs and stream exclude each other.", "prompt_logprobs")
    tokenizer = served.model.tokenizer
    more = fields.integers("stop_token_ids", 0, served.vocab_size - 1, _MOST_STOPS)
    ends = () if fields.boolean("ignore_eos") else tokenizer.ends
    asked = Asked(
        prompts=prompts,
        chat=chat,
        n=fields.integer("n", 1, 1, _MOST_CHOICES),
        max_tokens=max_tokens,
        sampling=_sampling(fields, served),
        stops=fields.texts("stop", _MOST_STOPS),
        stop_tokens=frozenset([*more, *ends]),
        keep_stop=fields.boolean("include_stop_str_in_output"),
        special=not fields.boolean("skip_special_tokens", True),
        echo=echo,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        token_ids=fields.boolean("return_token_ids"),
        stream=stream,
        include_usage=usage,
        continuous_usage=continuous,
    )
    _refuse_others(fields)
    fields.ignore("user", "metadata", "store", "service_tier", "request_id", "safety_identifier", "prompt_cache_key")
    fields.finish()
    return asked


def _sampling(fields: Fields, served: Served) -> SamplingParameters:
    k = fields.integer("top_k", 0, -1, _INT64)
    temperature = fields.number("temperature", 1.0, 0.0, 100.0)
    seed = fields.integer("seed", None, -_INT64, _INT64 - 1)
    most_tokens = served.vocab_size
    try:
        return SamplingParameters(
            temperature=temperature,
            top_k=0 if k >= most_tokens else max(k, 0),
            top_p=fields.number("top_p", 1.0, 1e-6, 1.0),
            min_p=fields.number("min_p", 0.0, 0.0, 1.0),
            repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100.0),
            presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
            frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
            logit_bias=_bias(fields, most_tokens),
            seed=secrets.randbits(63) if seed is None else seed,
        )
    except ConfigError as error:
        raise RequestError(str(error), str(error).partition(" ")[0]) from None


def _seed(seed: int, number: int) -> int:
    """The seed of one choice: 31 bits of all that was given and the choice's number."""
    return int(np.random.SeedSequence((seed % (1 << 64), number)).generate_state(1)[0]) & 0x7FFFFFFF


def _bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    given = fields.take("logit_bias")
    if given is None:
        return ()
    allowed = f"an object of token ids (below {vocab_size}) and numbers from -100 to 100, at most {_MOST_BIASES}"
    if not isinstance(given, dict) or len(given) > _MOST_BIASES:
        raise fields.wrong("logit_bias", allowed)
    bias: dict[int, float] = {}
    for name, value in given.items():
        is_id = name.isascii() and name.isdigit() and len(name) <= 10 and int(name) < vocab_size
        if not is_id or not is_number(value, -100, 100):
            raise fields.wrong("logit_bias", allowed)
        bias[int(name)] = float(value)
    return tuple(sorted(bias.items()))


def _prompts(fields: Fields, served: Served) -> tuple[Prompt, ...]:
    given = fields.take("prompt")
    opens = fields.boolean("add_special_tokens", True)
    last = fields.integer("truncate_prompt_tokens", None, 1, _INT64)
    fields.refuse("truncation_side", ["left"], "the last tokens are kept")
    if given is None:
        raise RequestError("prompt must be given: a text, a list of texts, token ids, or a list of these.", "prompt")
    several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    if len(several) > _MOST_PROMPTS:
        raise RequestError(f"prompt must be at most {_MOST_PROMPTS} prompts, got {len(several)}.", "prompt")
    prompts = [_prompt(fields, each, served, opens) for each in several]
    if last is not None:
        prompts = [replace(prompt, ids=prompt.ids[-last:]) for prompt in prompts]
    return tuple(prompts)


def _prompt(fields: Fields, given: Any, served: Served, opens: bool) -> Prompt:
    tokenizer = served.model.tokenizer
    if is_text(given) and given:
        ids = tokenizer.encode(given)
        return Prompt((*(tokenizer.opening(ids) if opens else ()), *ids), given)
    if isinstance(given, list) and given and is_tokens(given, 0, served.vocab_size - 1):
        return Prompt(tuple(given), tokenizer.decode(given))
    raise fields.wrong("prompt", f"a text or token ids (below {served.vocab_size}), or a list of these, none empty")


def conversation(fields: Fields, served: Served) -> tuple[int, ...]:
    """Token ids of `messages`, up to where the answer begins.

    Raises:
        RequestError: they are no messages, or the model has no chat template.
    """
    if served.template is None:
        raise RequestError(
            "this model has no chat template: use /v1/completions, or serve it with --chat_template=plain.", "messages"
        )
    given = fields.take("messages")
    if not isinstance(given, list) or not given:
        raise fields.wrong("messages", "a list of {role, content}, one or more")
    turns = [_turn(message, f"messages[{place}]") for place, message in enumerate(given)]
    try:
        return tuple(served.template.question(turns).tolist())
    except DataError as error:
        raise RequestError(f"messages: {error}.", "messages") from None


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object of role and content, got {short(message)}.", where)
    role, content = message.get("role"), message.get("content")
    roles = {**ROLES, "developer": "system"}
    if not isinstance(role, str) or role not in roles:
        raise RequestError(f"{where}.role must be one of {', '.join(roles)}, got {short(role)}.", f"{where}.role")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(is_text(text) for text in texts):
        raise RequestError(
            f"{where}.content must be a text or a list of {{type: text, text}}, got {short(content)}.",
            f"{where}.content",
        )
    others = [name for name, value in message.items() if name not in ("role", "content", "name") and value]
    if others:
        raise RequestError(
            f"{where}: {short(others[0])} is not served: messages are of role and content.", where, code="unsupported"
        )
    return {"role": roles[role], "content": "".join(str(text) for text in texts)}


def _refuse_tools(fields: Fields) -> None:
    tools = fields.take("tools")
    if tools is not None and (not isinstance(tools, list) or not tools):
        raise fields.wrong("tools", "a list of tools, one or more, or left out")
    if tools is not None:
        raise RequestError("tools is not served: say in a message what is there.", "tools", code="unsupported")
    if fields.take("tool_choice") not in (None, "none"):
        raise RequestError("tool_choice needs tools.", "tool_choice")
    fields.ignore("parallel_tool_calls")
    fields.refuse("functions", [], "it is old; so are its successors, tools, not served")
    fields.refuse("function_call", ["none"], "there are no functions")


def _refuse_others(fields: Fields) -> None:
    """What some servers have and this one has not, unless it asks for nothing."""
    form = fields.inner("response_format")
    if form is not None:
        kind = form.text("type", None)
        schema = form.take("json_schema")
        if kind not in ("text", "json_object", "json_schema"):
            raise form.wrong("type", "text, json_object or json_schema")
        if kind == "json_schema" and not (isinstance(schema, dict) and isinstance(schema.get("schema"), dict)):
            raise form.wrong("json_schema", "an object with a schema")
        if kind != "text":
            raise RequestError(f"response_format is not served: {_STRUCTURED}.", "response_format", code="unsupported")
    for name in ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        fields.refuse(name, [], _STRUCTURED)
    fields.refuse("use_beam_search", [False], "draw n choices")
    fields.refuse("length_penalty", [1, 1.0], "it is of beam search")
    fields.refuse("min_tokens", [0], "use ignore_eos with max_tokens, or logit_bias")
    fields.refuse("allowed_token_ids", [], "use logit_bias")
    fields.refuse("bad_words", [[]], "use logit_bias or stop")
    fields.refuse("priority", [0], "who comes first is served first")
    fields.refuse("cache_salt", [], "the cache of prompts is everybody's, or off with --engine.prefix_cache=false")
    fields.refuse("stream_interval", [1], "tokens are sent as they come")


def _require_model(fields: Fields, served: Served) -> None:
    name = fields.text("model", served.name)
    if name != served.name:
        raise RequestError(
            f"there is no model {short(name)} here. There is {short(served.name)}.", "model", 404, "model_not_found"
        )
