"""A served model whose engine is a parrot: a token of a text each round, of its own or of what is allowed."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient

from cramjax.data.examples.chat import PLAIN_TEMPLATE
from cramjax.errors import ConfigError
from cramjax.language_model import LanguageModel
from cramjax.serve.engine import Load
from cramjax.serve.engine.batch import NO_TOKEN
from cramjax.serve.http.answering import Service
from cramjax.serve.http.app import make_app, make_service
from cramjax.serve.http.run import settings
from cramjax.serve.request import Progress, Request, TokenLogprob
from cramjax.server import ServeConfig
from cramjax.serving import EngineConfig

SPEECH = "the stack 🙂 walks block by block, café. 👩‍👩‍👧 every token pays for its own place. "
CONTEXT = 256


@dataclass
class Parrot:
    """An engine without a model."""

    speech: list[int]
    end: int
    vocab_size: int
    context: int = CONTEXT
    slots: int = 4
    seconds: float = 0.0
    """That a round takes."""
    requests: dict[int, tuple[Request, Callable[[Progress], None], int]] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    added: int = 0
    fault: Exception | None = None
    going: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        self.going.set()

    def add(self, request: Request, listener: Callable[[Progress], None]) -> int:
        if len(request.prompt) + request.max_tokens > self.context:
            raise ConfigError("prompt and max_tokens must be at most the context.")
        self.added += 1
        self.requests[self.added] = (request, listener, 0)
        return self.added

    def cancel(self, number: int) -> None:
        if number in self.requests:
            self.cancelled.append(number)
            self.requests.pop(number)[1](Progress(reason="cancelled"))

    def obey(self, request: Request, drawn: int) -> int | None:
        """Some token that the constraint of a request allows; None: there is none."""
        assert request.constraint is not None
        words = np.full(-(-self.vocab_size // 32), -1, np.int32)
        request.constraint.allow(words)
        bits = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[: self.vocab_size])
        # Of logits that are all -inf the engine takes the first.
        token = int(np.random.default_rng((request.sampling.seed, drawn)).choice(bits)) if len(bits) else 0
        assert not len(bits) or 0 in bits or not request.constraint.take(0)
        return token if request.constraint.take(token) else None

    def step(self) -> bool:
        self.going.wait()
        if self.requests:
            time.sleep(self.seconds)
        if self.fault is not None:
            raise self.fault
        for number, (request, listener, drawn) in list(self.requests.items())[: self.slots]:
            if request.constraint is not None and drawn < request.max_tokens:
                token = self.obey(request, drawn)
                if token is None:
                    del self.requests[number]
                    listener(Progress(reason="stuck", why=request.constraint.failure or NO_TOKEN))
                    continue
            elif drawn < min(request.max_tokens, len(self.speech)):
                token = self.speech[drawn]
            elif drawn < request.max_tokens:
                token = self.end
            else:
                token = None
            tokens = () if token is None else (token,)
            drawn += len(tokens)
            stopped = token in request.stop_tokens or (request.constraint is not None and request.constraint.is_over)
            done = stopped or drawn >= request.max_tokens
            scores = request.prompt_logprobs and drawn <= 1
            logprobs = () if request.top_logprobs is None else tuple(self._score(t, request) for t in tokens)
            prompt = tuple(self._score(t, request) for t in request.prompt) if scores else ()
            prompt = (TokenLogprob(request.prompt[0], None), *prompt[1:]) if prompt else ()
            self.requests[number] = (request, listener, drawn)
            if done:
                del self.requests[number]
            reason = ("stop" if stopped else "length") if done else None
            listener(Progress(tokens, logprobs, prompt, reason=reason))
        return bool(self.requests)

    def _score(self, token: int, request: Request) -> TokenLogprob:
        likeliest = [(other % self.vocab_size, -0.5 - other) for other in range(request.top_logprobs or 0)]
        return TokenLogprob(token, -token / 100, tuple(likeliest))

    def load(self) -> Load:
        return Load(len(self.requests), 0, 10, len(self.requests), *[0] * 7)


@pytest.fixture(scope="session")
def spoken(run_of: Any) -> LanguageModel:
    """What the parrot is said to be: a vocabulary and a template."""
    return replace(run_of(sequence_length=CONTEXT).language_model, chat_template=PLAIN_TEMPLATE)


MakeService = Callable[..., Service]


@pytest.fixture(scope="session")
def service_of(spoken: LanguageModel) -> MakeService:
    """Serves a parrot, whose fields may be given; other words are of the configuration."""

    def make(*, slots: int = 4, seconds: float = 0.0, context: int = CONTEXT, **config: Any) -> Service:
        tokenizer = spoken.tokenizer
        speech = tokenizer.encode(SPEECH)
        parrot = Parrot(speech, tokenizer.separator_id, spoken.model.vocab_size, context, slots, seconds)
        return make_service(spoken, parrot, ServeConfig(name="parrot", engine=EngineConfig(slots=slots), **config))

    return make


@contextmanager
def listening(service: Service) -> Iterator[str]:
    """The address of a service that listens, with all that real servers have between it and its clients."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        server = uvicorn.Server(settings(service))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [own]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{own.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=30)


@pytest.fixture(scope="module")
def service(service_of: MakeService) -> Service:
    return service_of()


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        yield client
