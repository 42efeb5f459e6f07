"""The routes of a served model, as an ASGI application."""

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cramjax.data.examples import PieceEncoder, chat_template
from cramjax.data.examples.chat import read_template, special_texts
from cramjax.errors import ConfigError
from cramjax.language_model import LanguageModel
from cramjax.serve.constraints import Grammars
from cramjax.serve.http.answering import Completing, Gone, Service, read_body
from cramjax.serve.http.answers import token_text
from cramjax.serve.http.asked import chat, completion
from cramjax.serve.http.calls import FORMS, form_of
from cramjax.serve.http.conversation import conversation, no_tools
from cramjax.serve.http.embedding import Embedding
from cramjax.serve.http.fields import RequestError
from cramjax.serve.http.gate import MISTAKE, Gate, error_response
from cramjax.serve.http.metrics import Metrics
from cramjax.serve.http.openapi import description
from cramjax.serve.http.served import Served
from cramjax.serve.http.tables import detokenize_table, tokenize_table
from cramjax.serve.http.worker import Limits, ServedEngine, Worker
from cramjax.server import ServeConfig

_LOG = logging.getLogger(__name__)

MOST_TEXTS = 2048
"""Texts that a request for embeddings can hold; more of them wait, or are refused."""
_PAGE = Path(__file__).with_name("page.html")


def make_service(
    model: LanguageModel, engine: ServedEngine, config: ServeConfig, adapters: tuple[str, ...] = ()
) -> Service:
    """A model with its engine, ready to be served.

    Args:
        model: what is served.
        engine: over it; nobody else may use it from now on.
        config: to whom, and how much.
        adapters: names of those that the engine has.

    Raises:
        DataError: the chat template cannot be read.
        ConfigError: an adapter has the model's name, or there are no tools for `config.tool_calls`.
    """
    own = model.chat_template
    source = own if own is None and config.chat_template == "auto" else read_template(config.chat_template, own)
    template = None if source is None else chat_template(source, PieceEncoder(model.tokenizer))
    calls = form_of(template) if config.tool_calls == "auto" else FORMS[config.tool_calls]
    if config.tool_calls != "auto" and (template is None or "tools" not in template.reads):
        raise ConfigError("tool_calls must be auto: this model's chat template, if it has one, tells it of no tools.")
    name = config.name or model.path.name or str(model.path)
    if name in adapters:
        raise ConfigError(f"the model is called {name} too: give the adapter another name, or the model (--name).")
    grammars = Grammars(model.tokenizer)
    served = Served(model, name, template, calls, grammars, engine.context, engine.vocab_size, adapters)
    if served.makes == "text":
        _ = served.grammars.vocabulary  # now, so that no request waits for it
        if config.engine.deterministic or not config.engine.prefix_cache:
            _LOG.warning(
                "Without a prefix cache (prefix_cache=false or deterministic=true) each beam of a search reads its "
                "whole text at every step: use_beam_search will be slow."
            )
    slots = MOST_TEXTS if served.makes == "embeddings" else config.engine.slots * (1 + len(adapters))
    limits = Limits(slots, config.queue, config.queue_tokens)
    worker = Worker(engine, limits)
    return Service(served, worker, Metrics(worker, name), config)


def make_app(service: Service) -> ASGIApp:
    """The application; it starts the engine's thread, and ends it."""
    routes = Routes(service)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    app = Starlette(
        routes=[
            Route("/", routes.page),
            Route("/health", routes.health),
            Route("/ping", routes.health, methods=["GET", "POST"]),
            Route("/load", routes.load),
            Route("/version", routes.version),
            Route("/metrics", routes.metrics),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/completions", Completing(service, completion), methods=["POST"]),
            Route("/v1/chat/completions", Completing(service, chat), methods=["POST"]),
            Route("/v1/embeddings", Embedding(service), methods=["POST"]),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/detokenize", routes.detokenize, methods=["POST"]),
            Route("/tokenizer_info", routes.tokenizer_info),
            Route("/openapi.json", routes.openapi),
        ],
        exception_handlers={HTTPException: _other, RequestError: _wrong, Exception: _mistake},
        lifespan=lifespan,
    )
    return Gate(app, service.config.api_key)


async def _wrong(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _mistake(request: Request, error: Exception) -> Response:
    return error_response(MISTAKE)


async def _other(request: Request, error: Exception) -> Response:
    """Errors of the routing: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:100]}"
    raised = RequestError(f"there is no {what} here ({error.detail}): see /openapi.json.", status=error.status_code)
    return JSONResponse(raised.body(), error.status_code, headers=dict(error.headers or {}))


class Routes:
    """All but those that answer with text."""

    def __init__(self, service: Service):
        """Serve it."""
        self._service, self._started = service, int(time.time())

    async def page(self, request: Request) -> Response:
        """The page to try the model with."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        headers = {"content-security-policy": f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}
        return Response(_page(), media_type="text/html; charset=utf-8", headers=headers)

    async def openapi(self, request: Request) -> Response:
        """The description of all routes."""
        return JSONResponse(description(self._service.served))

    async def health(self, request: Request) -> Response:
        """Whether requests are answered."""
        worker = self._service.worker
        if worker.failure is not None or worker.is_draining:
            status = "draining" if worker.failure is None else f"the engine has ended: {worker.failure}"
            return JSONResponse({"status": status}, 503, headers={"retry-after": "1"})
        return JSONResponse({"status": "ok"})

    async def load(self, request: Request) -> Response:
        """How much is in progress and waits, as vLLM's routers ask."""
        worker = self._service.worker
        return JSONResponse({"server_load": worker.running + worker.waiting})

    async def version(self, request: Request) -> Response:
        """CramJAX's."""
        return JSONResponse({"version": version("cramjax")})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return PlainTextResponse(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """The model, and its adapters."""
        names = (self._service.served.name, *self._service.served.adapters)
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """One by its name."""
        self._service.served.require_name(name := request.path_params["name"])
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        served = self._service.served
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "cramjax",
            "root": served.name,
            "parent": None if name == served.name else served.name,
            "max_model_len": served.context,
            "chat": served.template is not None and served.makes == "text",
            "makes": served.makes,
        }

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text or of a conversation."""
        return JSONResponse(await asyncio.to_thread(self._tokenized, await self._values(request)))

    def _tokenized(self, values: Mapping[str, Any]) -> dict[str, Any]:
        served, given = self._service.served, tokenize_table().read(values)
        tokenizer, text, opens = served.model.tokenizer, given["prompt"], given["add_special_tokens"]
        if given["messages"] is not None:
            if given["tools"] is not None and served.calls is None:
                raise no_tools("tools")
            ids = list(conversation(given, served, given["tools"]))
        else:
            if text is None:
                raise RequestError("prompt or messages must be given.", "prompt")
            # Of a special token alone, its id: how others ask for the end of text.
            special = tokenizer.backend.token_to_id(text) if PieceEncoder(tokenizer).special.fullmatch(text) else None
            ids = tokenizer.encode(text) if special is None else [special]
            ids = [*(tokenizer.opening(ids) if opens else ()), *ids]
        found: dict[str, Any] = {"count": len(ids), "max_model_len": served.context, "tokens": ids}
        if given["return_token_strs"]:
            found["token_strs"] = [token_text(tokenizer, index) for index in ids]
        return found

    async def detokenize(self, request: Request) -> Response:
        """Text of token ids."""
        served = self._service.served
        ids = detokenize_table(served.vocab_size).read(await self._values(request))["tokens"]
        return JSONResponse({"prompt": await asyncio.to_thread(served.model.tokenizer.decode, ids, special=True)})

    async def tokenizer_info(self, request: Request) -> Response:
        """What lm-evaluation-harness asks of a tokenizer that is elsewhere."""
        model = self._service.served.model
        names = {"bos_token": None, "eos_token": None, **special_texts(model.tokenizer)}
        pad = model.tokenizer.backend.id_to_token(model.tokenizer.pad_id)
        known = {"tokenizer_class": "tokenizers.Tokenizer", "chat_template": model.chat_template}
        return JSONResponse({**known, **names, "pad_token": pad})

    async def _values(self, request: Request) -> dict[str, Any]:
        try:
            return await read_body(request.receive, self._service.config)
        except Gone:
            raise RequestError("the client has left.") from None


@functools.cache
def _page() -> str:
    return _PAGE.read_text(encoding="utf-8")
