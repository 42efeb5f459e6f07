"""What a body of /v1/completions or /v1/chat/completions asks for: its fields, and the rules between them."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cramjax.errors import ConfigError
from cramjax.serve.beam import BeamSearch
from cramjax.serve.http.conversation import conversation
from cramjax.serve.http.fields import RequestError, several
from cramjax.serve.http.searching import MOST_CANDIDATES, Search
from cramjax.serve.http.served import Served
from cramjax.serve.http.shaped import MakeConstraint, constraint_of
from cramjax.serve.http.tables import chat_table, completion_table
from cramjax.serve.http.tools import Tools, tools_of
from cramjax.serve.request import Request, SamplingParameters


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
    constrain: MakeConstraint | None = None
    """What the answers' tokens may be."""
    tools: Tools | None = None
    """What the answers may call."""
    adapter: str | None = None
    """Which adapter of the model's answers; None: the model itself."""
    salt: str = ""
    """Only requests with the same one share what was read of their beginnings."""
    search: Search | None = None
    """How answers are looked for, instead of drawn."""
    ids_as_names: bool = False
    """Whether tokens are called by their ids where log-probabilities are given."""

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
            constraint=None if self.constrain is None else self.constrain(),
            salt=self.salt,
            adapter=self.adapter,
        )


def completion(body: Mapping[str, Any], served: Served) -> Asked:
    """What a body of /v1/completions asks for.

    Raises:
        RequestError: a field is wrong.
    """
    values = completion_table(served.vocab_size).read(body)
    _require_text(values, served)
    most, echo = values["max_tokens"], values["echo"]
    if most == 0 and not echo:
        raise RequestError("max_tokens must be 1 or more, or 0 with echo, got 0.", "max_tokens")
    return _asked(values, served, _prompts(values, served), max_tokens=most, logprobs=values["logprobs"], echo=echo)


def chat(body: Mapping[str, Any], served: Served) -> Asked:
    """What a body of /v1/chat/completions asks for.

    Raises:
        RequestError: a field is wrong, or the model has no chat template.
    """
    values = chat_table(served.vocab_size).read(body)
    _require_text(values, served)
    top, wants = values["top_logprobs"], values["logprobs"]
    if top is not None and not wants:
        raise RequestError("top_logprobs needs logprobs to be true.", "top_logprobs")
    newer, older = values["max_completion_tokens"], values["max_tokens"]
    tools = tools_of(values, served)
    ids = conversation(values, served, tools.told if tools else None)
    return _asked(
        values,
        served,
        (Prompt(ids, ""),),
        chat=True,
        max_tokens=older if newer is None else newer,
        logprobs=(top or 0) if wants else None,
        tools=tools,
    )


def _asked(
    values: Mapping[str, Any],
    served: Served,
    prompts: tuple[Prompt, ...],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    chat: bool = False,
    echo: bool = False,
    tools: Tools | None = None,
) -> Asked:
    """With the fields that both have."""
    stream, options = values["stream"], values["stream_options"]
    if options is not None and not stream:
        raise RequestError("stream_options needs stream to be true.", "stream_options")
    if values["prompt_logprobs"] is not None and stream:
        raise RequestError("prompt_logprobs and stream exclude each other.", "prompt_logprobs")
    ends = () if values["ignore_eos"] else served.model.tokenizer.ends
    stop_tokens = frozenset([*(values["stop_token_ids"] or ()), *ends])
    constrain = constraint_of(values, served, stop_tokens)
    if tools is not None and tools.forced is not None:
        if constrain is not None:
            raise RequestError("tool_choice says what an answer is: nothing else can.", "tool_choice")
        constrain = tools.forced
    search = _search(values, served, tuple(sorted(stop_tokens)), max_tokens)
    return Asked(
        prompts=prompts,
        chat=chat,
        n=values["n"],
        max_tokens=max_tokens,
        sampling=_sampling(values, served),
        stops=several(values["stop"]),
        stop_tokens=stop_tokens,
        keep_stop=values["include_stop_str_in_output"],
        special=not values["skip_special_tokens"],
        echo=echo,
        logprobs=logprobs,
        prompt_logprobs=values["prompt_logprobs"],
        token_ids=values["return_token_ids"],
        stream=stream,
        include_usage=bool(options and options["include_usage"]),
        continuous_usage=bool(options and options["continuous_usage_stats"]),
        constrain=constrain,
        tools=tools,
        adapter=served.require_name(values["model"]),
        salt=values["cache_salt"] or "",
        search=search,
        ids_as_names=values["return_tokens_as_token_ids"],
    )


_DRAWN: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "temperature": (0, 1),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": (None, {}),
    "stop": (None, []),
    "min_tokens": (0,),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "response_format": (None, {"type": "text", "json_schema": None}),
    "structured_outputs": (None,),
    "tool_choice": (None, "none", "auto"),
}
"""Fields that say how an answer is drawn, given, or ended by its text, and their values that ask for none of it."""


def _search(values: Mapping[str, Any], served: Served, ends: tuple[int, ...], max_tokens: int | None) -> Search | None:
    """How answers are looked for, if they are."""
    penalty = values["length_penalty"]
    if not values["use_beam_search"]:
        if penalty != 1:
            raise RequestError("length_penalty needs use_beam_search to be true.", "length_penalty")
        return None
    for name, neutral in _DRAWN.items():
        if values.get(name) not in neutral:
            raise RequestError(f"{name} and use_beam_search exclude each other: leave one out.", name)
    if max_tokens == 0:
        raise RequestError("max_tokens must be 1 or more with use_beam_search, got 0.", "max_tokens")
    most = MOST_CANDIDATES - len(ends)
    if values["n"] > most:
        number = f"{len(ends)} tokens that end an answer"
        raise RequestError(f"n must be at most {most} with use_beam_search and {number}, got {values['n']}.", "n")
    return Search(BeamSearch(values["n"], float(penalty)), ends)


def _require_text(values: Mapping[str, Any], served: Served) -> None:
    served.require_name(values["model"])
    if served.makes != "text":
        raise RequestError("this model makes embeddings, and no text: use /v1/embeddings.", "model", code="unsupported")


def _sampling(values: Mapping[str, Any], served: Served) -> SamplingParameters:
    k, seed, bias = values["top_k"], values["seed"], values["logit_bias"] or {}
    same = ("top_p", "min_p", "temperature", "repetition_penalty", "presence_penalty", "frequency_penalty")
    try:
        return SamplingParameters(
            **{name: float(values[name]) for name in same},
            top_k=0 if k >= served.vocab_size else max(k, 0),
            logit_bias=tuple(sorted({int(token): float(value) for token, value in bias.items()}.items())),
            seed=secrets.randbits(63) if seed is None else seed,
        )
    except ConfigError as error:
        raise RequestError(str(error), str(error).partition(" ")[0]) from None


def _seed(seed: int, number: int) -> int:
    """The seed of one choice: 31 bits of all that was given and the choice's number."""
    return int(np.random.SeedSequence((seed % (1 << 64), number)).generate_state(1)[0]) & 0x7FFFFFFF


def _prompts(values: Mapping[str, Any], served: Served) -> tuple[Prompt, ...]:
    given, most = values["prompt"], values["truncate_prompt_tokens"]
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    prompts = [_prompt(each, served, values["add_special_tokens"]) for each in several]
    if most == 0:
        raise RequestError("truncate_prompt_tokens must be 1 or more, or -1, got 0.", "truncate_prompt_tokens")
    if most is not None:
        most = max(served.context - values["max_tokens"], 1) if most < 0 else most
        kept = slice(most) if values["truncation_side"] == "right" else slice(-most, None)
        prompts = [_kept(prompt, prompt.ids[kept], served) for prompt in prompts]
    return tuple(prompts)


def _kept(prompt: Prompt, ids: tuple[int, ...], served: Served) -> Prompt:
    """A prompt of which these ids are left."""
    return prompt if ids == prompt.ids else Prompt(ids, served.model.tokenizer.decode(ids))


def _prompt(given: str | list[int], served: Served, opens: bool) -> Prompt:
    tokenizer = served.model.tokenizer
    if not isinstance(given, str):
        return Prompt(tuple(given), tokenizer.decode(given))
    ids = tokenizer.encode(given)
    return Prompt((*(tokenizer.opening(ids) if opens else ()), *ids), given)
