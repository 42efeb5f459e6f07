"""Answers as OpenAI's interface has them, whole or in pieces: the whole is made of the same pieces."""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cramjax.data import Tokenizer
from cramjax.serve.http.asked import Asked, Prompt
from cramjax.serve.http.calls import Call, Calls, joined
from cramjax.serve.http.served import Served
from cramjax.serve.request import Progress, Reason, TokenLogprob
from cramjax.serve.text import Detokenizer, TextStream

_REASONS: dict[Reason, str] = {"stop": "stop", "length": "length", "cancelled": "abort", "stuck": "abort"}


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability, and where its text begins."""

    logprob: TokenLogprob
    offset: int


@dataclass(frozen=True)
class Piece:
    """What is new of one choice. A piece with a reason is its last."""

    text: str = ""
    scored: tuple[Scored, ...] = ()
    tokens: tuple[int, ...] = ()
    reason: str | None = None
    calls: tuple[Call, ...] = ()
    why: str = ""
    """More of the reason."""

    def __add__(self, other: "Piece") -> "Piece":
        """Both, one after the other."""
        scored, tokens = self.scored + other.scored, self.tokens + other.tokens
        reason, why = other.reason or self.reason, other.why or self.why
        return Piece(self.text + other.text, scored, tokens, reason, self.calls + other.calls, why)

    @property
    def is_something(self) -> bool:
        """Whether there is anything in it that is to be given away at once."""
        return bool(self.text or self.calls or self.reason)


class Choice:
    """One of the answers asked for, while it grows."""

    def __init__(self, served: Served, asked: Asked, index: int):
        """Begin the choice of a number; those of one prompt follow each other."""
        self.index, self._asked = index, asked
        self.prompt: Prompt = asked.prompts[index // asked.n]
        self._tokenizer = served.model.tokenizer
        tools, known = asked.tools, self._tokenizer.special_ids
        self._calls = Calls(tools.form, tools.names, tools.many) if tools else None
        marks = (
            {self._tokenizer.backend.token_to_id(mark) for mark in (tools.form.begin, tools.form.end)} if tools else ()
        )
        shown = known if asked.special else known.intersection(marks)
        self._stream = TextStream(self._tokenizer, self.prompt.ids, asked.stops, keep_stop=asked.keep_stop, shown=shown)
        self._shown = len(self.prompt.text) if asked.echo else 0
        self._has_begun = self.is_over = False
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self.cached = self.drawn = 0
        self._held = Piece()

    def take(self, progress: Progress) -> Piece:
        """What can be given away after progress, if it `is_something`."""
        new = self._begin(progress) if not self._has_begun else Piece()
        given = progress.logprobs or (None,) * len(progress.tokens)
        for token, logprob in zip(progress.tokens, given, strict=True):
            offset = self._shown + self._stream.length
            is_end = progress.reason == "stop" and token in self._asked.stop_tokens
            text = "" if is_end and not self._asked.special else self._stream.add(token)
            scored = (Scored(logprob, offset),) if logprob and self._asked.logprobs is not None else ()
            new += Piece(text, scored, (token,))
            self.drawn += 1
            if self._stream.stopped:
                return self._end(new, "stop")
        if progress.reason is not None:
            return self._end(new + Piece(self._stream.end(), why=progress.why), _REASONS[progress.reason])
        new, self._held = self._held + self._called(new), Piece()
        if not new.is_something:
            new, self._held = self._held, new
        return new

    def _called(self, piece: Piece) -> Piece:
        """A piece with the calls that are in its text, instead of their text."""
        if self._calls is None:
            return piece
        text, calls = self._calls.add(piece.text)
        if piece.reason is not None:
            text += self._calls.rest()
        reason = "tool_calls" if piece.reason == "stop" and self._calls.count else piece.reason
        return replace(piece, text=text, calls=calls, reason=reason)

    def _begin(self, progress: Progress) -> Piece:
        self._has_begun, self.cached, self.prompt_logprobs = True, progress.cached, progress.prompt_logprobs
        if not self._asked.echo:
            return Piece()
        text, scored = Detokenizer(self._tokenizer), []
        length = 0
        for each in progress.prompt_logprobs if self._asked.logprobs is not None else ():
            scored.append(Scored(each, length))
            length += len(text.add(each.token))
        return Piece(self.prompt.text, tuple(scored))

    def _end(self, new: Piece, reason: str) -> Piece:
        self.is_over = True
        return self._held + self._called(new + Piece(reason="stop" if self._stream.stopped else reason))


@dataclass(frozen=True)
class Form:
    """How answers of one request are written."""

    served: Served
    asked: Asked
    id: str = field(default="")
    created: int = field(default_factory=lambda: int(time.time()))

    @staticmethod
    def of(served: Served, asked: Asked) -> "Form":
        """That of a new answer."""
        return Form(served, asked, f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}")

    def whole(self, choices: Sequence[Choice], pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer in one."""
        written = [self._choice(choice, piece, whole=True) for choice, piece in zip(choices, pieces, strict=True)]
        for choice, content in zip(choices, written, strict=True):
            if self.asked.prompt_logprobs is not None:
                content["prompt_logprobs"] = self._prompt_logprobs(choice.prompt_logprobs)
            if self.asked.token_ids:
                content["prompt_token_ids"] = list(choice.prompt.ids)
        return self._object("chat.completion" if self.asked.chat else "text_completion", written) | {
            "usage": usage(choices, self.asked)
        }

    def chunk(self, choice: Choice, piece: Piece, choices: Sequence[Choice]) -> dict[str, Any]:
        """A piece of a stream."""
        written = self._object(self._chunk_name, [self._choice(choice, piece, whole=False)])
        return written | {"usage": usage(choices, self.asked)} if self.asked.continuous_usage else written

    def first(self, index: int) -> dict[str, Any]:
        """What comes before the first piece of a choice of a chat."""
        delta = {"role": "assistant", "content": ""}
        return self._object(
            self._chunk_name, [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]
        )

    def last(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The chunk that says how many tokens there were."""
        return self._object(self._chunk_name, []) | {"usage": usage(choices, self.asked)}

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.asked.chat else "text_completion"

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.asked.adapter or self.served.name,
            "choices": choices,
        }

    def _choice(self, choice: Choice, piece: Piece, whole: bool) -> dict[str, Any]:
        scored = None if self.asked.logprobs is None else self._logprobs(piece.scored)
        content: dict[str, Any] = {"index": choice.index, "logprobs": scored, "finish_reason": piece.reason}
        if not self.asked.chat:
            content["text"] = piece.text
        elif whole:
            calls = {"tool_calls": [call.content() for call in joined(piece.calls)]} if piece.calls else {}
            said = piece.text if piece.text or not calls else None
            content["message"] = {"role": "assistant", "content": said, "refusal": None, **calls}
        else:
            delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
            if piece.calls:
                delta["tool_calls"] = [{"index": call.index, **call.content()} for call in joined(piece.calls)]
            content["delta"] = delta
        if self.asked.token_ids:
            content["token_ids"] = list(piece.tokens)
        if piece.why:
            content["stop_reason"] = piece.why
        return content

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any]:
        most = self.asked.logprobs or 0
        if self.asked.chat:
            return {"content": [self._chat_logprob(each.logprob, most) for each in scored]}
        return {
            "tokens": [self._name(each.logprob.token) for each in scored],
            "token_logprobs": [each.logprob.logprob for each in scored],
            "top_logprobs": [self._top(each.logprob, most) for each in scored],
            "text_offset": [each.offset for each in scored],
        }

    def _prompt_logprobs(self, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any] | None]:
        """The form of vLLM: of each token by its id, the first none."""
        tokenizer, most = self.served.model.tokenizer, self.asked.prompt_logprobs or 0
        return [
            None
            if each.logprob is None
            else {
                str(token): {"logprob": logprob, "decoded_token": token_text(tokenizer, token)}
                for token, logprob in dict([*each.top[:most], (each.token, each.logprob)]).items()
            }
            for each in logprobs
        ]

    def _top(self, logprob: TokenLogprob, most: int) -> dict[str, float] | None:
        if logprob.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, value in [*logprob.top[:most], (logprob.token, logprob.logprob)]:
            found.setdefault(self._name(token), value)
        return found

    def _chat_logprob(self, logprob: TokenLogprob, most: int) -> dict[str, Any]:
        def of(token: int, value: float | None) -> dict[str, Any]:
            known = self.served.model.tokenizer.token_bytes(token)
            return {"token": self._name(token), "logprob": value, "bytes": list(known)}

        return of(logprob.token, logprob.logprob) | {"top_logprobs": [of(*each) for each in logprob.top[:most]]}

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.asked.ids_as_names else token_text(self.served.model.tokenizer, token)


def usage(choices: Sequence[Choice], asked: Asked) -> dict[str, Any]:
    """Tokens of the prompts, each once, and of all choices."""
    prompt, drawn = sum(len(prompt.ids) for prompt in asked.prompts), sum(choice.drawn for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached for choice in choices[:: asked.n])},
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """What a token is called: its text, or its bytes where these are no text."""
    known = tokenizer.token_bytes(token)
    try:
        return known.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)
